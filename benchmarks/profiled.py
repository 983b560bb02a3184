"""Which functions of ours a process goes through, thread by thread.

``python -m benchmarks.profiled OPTIONS`` is deconvd-server with all its threads profiled. On standard input it takes
``begin``, which it answers with an empty line, and ``end``, which it answers with what has been called since, as JSON.
"""

from __future__ import annotations

import _thread
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

__all__ = ["LEFT_OUT", "Profile", "start_profiling"]

_PACKAGES = ("deconvd", "deconvd_client", "deconvd_server")

LEFT_OUT = (
    # how often it looks is a matter of time
    "deconvd.direct.busy_polling",
    # how many there are is the problem's matter, and which thread does how much is chance
    "deconvd_server.device.cpu.blocking",
    "deconvd_server.device.cpu.columns",
    "deconvd_server.device.cpu.products",
    "deconvd_server.device.cpu.team",
)
"""Modules whose functions do not count, nor what those call."""


class Profile:
    """The modules whose functions are called while it records."""

    def __init__(self) -> None:
        self._modules: dict[_Thread, list[str]] | None = None

    def begin(self) -> None:
        """Forget what was recorded, and record."""
        self._modules = {}

    def end(self) -> list[list[str]]:
        """Record no more. Return each thread's modules, one a call; the thread that called first comes first."""
        modules, self._modules = self._modules or {}, None
        return list(modules.values())

    def note(self, thread: _Thread, module: str) -> None:
        """Take note that a thread calls a function of a module."""
        if (modules := self._modules) is not None:
            modules.setdefault(thread, []).append(module)


class _Thread:
    """A thread of which `sys.setprofile` tells."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._left_out_depth = 0

    def trace(self, frame: FrameType, event: str, _: object) -> None:
        """Tell the profile of a call that counts."""
        if self._left_out_depth:
            self._left_out_depth += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and (module := _module(frame)) is not None:
            if module in LEFT_OUT:
                self._left_out_depth = 1
            else:
                self._profile.note(self, module)


_modules: dict[CodeType, str | None] = {}


def _module(frame: FrameType) -> str | None:
    """Return the module of the function that a frame runs, if it is one of ours."""
    if frame.f_code not in _modules:
        name = str(frame.f_globals.get("__name__"))
        is_ours = name.partition(".")[0] in _PACKAGES
        is_generated = frame.f_code.co_filename.startswith("<")  # as a dataclass's __init__ is
        _modules[frame.f_code] = name if is_ours and not is_generated else None
    return _modules[frame.f_code]


@contextmanager
def start_profiling() -> Iterator[Profile]:
    """Profile this thread, and all that start in the block."""
    profile = Profile()

    def begin_thread(frame: FrameType, event: str, argument: object) -> None:
        hear = _Thread(profile).trace
        sys.setprofile(hear)
        hear(frame, event, argument)

    start = _thread.start_new_thread

    def start_profiled(work: Callable[..., object], arguments: tuple[Any, ...]) -> int:
        def run() -> None:
            sys.setprofile(begin_thread)
            work(*arguments)

        return start(run, ())

    threading.setprofile(begin_thread)
    sys.setprofile(begin_thread)
    # those of `threading` are started by a name of its own
    _thread.start_new_thread = start_profiled  # type: ignore[assignment]  # without keywords
    try:
        yield profile
    finally:
        _thread.start_new_thread = start
        sys.setprofile(None)
        threading.setprofile(None)


def _obey(profile: Profile) -> None:
    for command in sys.stdin:
        if command == "begin\n":
            profile.begin()
            print(flush=True)
        else:
            print(json.dumps(profile.end()), flush=True)


def _main() -> None:
    with start_profiling() as profile:
        threading.Thread(target=_obey, args=(profile,), daemon=True).start()
        from deconvd_server.__main__ import main

        main()


if __name__ == "__main__":
    _main()
