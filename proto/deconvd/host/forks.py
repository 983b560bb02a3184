"""Forks: a child begins anew with what threads share, and is not forked in the midst of what it could not begin anew.

In a child only the thread that forked goes on. What its parent's other threads held, or were about to do, stays as it
is for ever: locks, sockets that both have now, gRPC's core. This is the one place that says what a child does with it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final, Protocol

__all__ = [
    "ForkBlocker",
    "leave_to_parent",
    "new_lock",
    "new_reentrant_lock",
    "register_fork_reset",
]

_MAX_FORK_DELAY_S: Final = 2.0
"""How long a fork waits for work under way: what takes longer is rather not waited for."""

_SETTLE_S: Final = 0.005
_SETTLE_LIMIT_S: Final = 0.1
"""How long threads that are not ours (gRPC's) usually go on after it has ended, and for how long they may."""

_POLL_S: Final = 0.001

_THREADS_DIRECTORY: Final = Path("/proc/self/task")
"""Where Linux tells of threads."""


class _ForkResettable(Protocol):
    def reset_after_fork(self) -> None: ...


_PROCESS_NAME: Final = (
    (_THREADS_DIRECTORY.parent / "comm").read_text().strip() if _THREADS_DIRECTORY.is_dir() else ""
)
"""The process's, and that of its first thread and of Python's."""

_reset_owners: Final[weakref.WeakSet[_ForkResettable]] = weakref.WeakSet()
_locks: Final[weakref.WeakSet[threading.Lock | threading.RLock]] = weakref.WeakSet()
_kept_alive: Final[list[object]] = []
_active_work: Final[set[ForkBlocker]] = set()
_forking_threads: Final[set[int]] = set()
"""Threads that are about to fork."""

_last_work_end_s = -_SETTLE_LIMIT_S
"""When work ended last."""


def new_lock() -> threading.Lock:
    """Return a lock that nobody holds in a forked child."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def new_reentrant_lock() -> threading.RLock:
    """Return such a lock that the thread that holds it may take again, as a finalizer does that runs there."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def register_fork_reset(owner: _ForkResettable) -> None:
    """Have `begin_anew_in_child` of an object, referred to weakly, called in each child that is forked from now on.

    It is called before the child does anything else, with no lock of `new_lock` held.
    """
    _reset_owners.add(owner)


def leave_to_parent(thing: object) -> None:
    """Keep something of the parent's for ever, in a child: its finalizer would wait for threads that are not here."""
    _kept_alive.append(thing)


class ForkBlocker(AbstractContextManager[None]):
    """A block that forks wait for, for a while, and that waits while another thread forks.

    For threads that no signal handler runs in.
    """

    def __enter__(self) -> None:
        while True:
            # first said, then looked: `_before` does it in the other order
            _active_work.add(self)
            if not _forking_threads:
                return
            _active_work.discard(self)
            time.sleep(_POLL_S)

    def __exit__(self, *_: object) -> None:
        global _last_work_end_s  # noqa: PLW0603 - forks happen to the process, not to an object
        _last_work_end_s = time.monotonic()
        _active_work.discard(self)


def _before_fork() -> None:
    _forking_threads.add(threading.get_ident())
    until_s = time.monotonic() + _MAX_FORK_DELAY_S
    while _active_work and time.monotonic() < until_s:
        time.sleep(_POLL_S)
    _settle()


def _settle() -> None:
    """Wait until threads of libraries have done what comes after work."""
    time.sleep(max(_last_work_end_s + _SETTLE_S - time.monotonic(), 0))
    until_s = _last_work_end_s + _SETTLE_LIMIT_S
    while time.monotonic() < until_s and not _are_threads_asleep():
        time.sleep(_POLL_S)


def _are_threads_asleep() -> bool:
    """Return whether all threads sleep that have a name of their own, as those of libraries have."""
    for task in _THREADS_DIRECTORY.iterdir() if _THREADS_DIRECTORY.is_dir() else ():
        with suppress(OSError):  # it has ended
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(") ")
            if name != _PROCESS_NAME and rest.startswith("R"):
                return False
    return True


def _after_fork_in_parent() -> None:
    _forking_threads.discard(threading.get_ident())


def _after_fork_in_child() -> None:
    _forking_threads.clear()
    _active_work.clear()
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[union-attr]  # as the standard library's own modules do
    for owner in _reset_owners:
        owner.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
