"""Forks: a child process resets what threads share, and forks wait for work that a child could not reset.

In a child only the thread that forked continues. Everything that the parent's other threads held stays as it was at the
moment of the fork: locks stay locked, sockets are now shared with the parent, and gRPC's core waits for threads that do
not exist. This module is the only place that says what a child does about it:

    before the fork    wait for `ForkBlocker` blocks to end, for at most 2 s, and for gRPC's threads to sleep
    in the parent      let `ForkBlocker` blocks begin again
    in the child       replace all locks of `new_lock`, then call `reset_after_fork` of all registered objects
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
"""How long a fork waits for running work. Then it goes ahead: a delayed fork is worse than a broken child."""

_SETTLE_S: Final = 0.005
"""How long gRPC's own threads usually continue after our work has ended."""

_SETTLE_LIMIT_S: Final = 0.1
"""How long a fork waits for gRPC's threads, at most."""

_POLL_S: Final = 0.001

_THREADS_DIRECTORY: Final = Path("/proc/self/task")
"""Where Linux lists the threads of this process."""


class _ForkResettable(Protocol):
    def reset_after_fork(self) -> None: ...


_PROCESS_NAME: Final = (
    (_THREADS_DIRECTORY.parent / "comm").read_text().strip() if _THREADS_DIRECTORY.is_dir() else ""
)
"""The name of the process. Its first thread and Python's threads have the same name; gRPC's threads have their own."""

_reset_owners: Final[weakref.WeakSet[_ForkResettable]] = weakref.WeakSet()
_locks: Final[weakref.WeakSet[threading.Lock | threading.RLock]] = weakref.WeakSet()
_kept_alive: Final[list[object]] = []
_active_work: Final[set[ForkBlocker]] = set()
_forking_threads: Final[set[int]] = set()
"""Identifiers of the threads that are forking now."""

_last_work_end_s = -_SETTLE_LIMIT_S
"""When a `ForkBlocker` block last ended, on the monotonic clock."""


def new_lock() -> threading.Lock:
    """Return a lock that is free in a forked child, whoever held it in the parent."""
    lock = threading.Lock()
    _locks.add(lock)
    return lock


def new_reentrant_lock() -> threading.RLock:
    """Return such a lock that its holder may take again: for methods that a finalizer may call in the same thread."""
    lock = threading.RLock()
    _locks.add(lock)
    return lock


def register_fork_reset(owner: _ForkResettable) -> None:
    """Have `reset_after_fork` of an object called in each child that is forked from now on.

    It is called before the child does anything else, with all locks of `new_lock` free. Only a weak reference to the
    object is kept.
    """
    _reset_owners.add(owner)


def leave_to_parent(owned: object) -> None:
    """In a child, keep an object alive until the process ends.

    Its finalizer would wait for threads that exist only in the parent.
    """
    _kept_alive.append(owned)


class ForkBlocker(AbstractContextManager[None]):
    """A block that delays forks until it ends, and that does not begin while another thread forks.

    Not for the main thread, in which signal handlers run: a handler that forks would wait for its own thread's block.
    """

    def __enter__(self) -> None:
        while True:
            # First announce, then check. `_before_fork` does both in the same order, so one of the two sees the other.
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
    """Wait until the threads of libraries have finished what they do after our work, and sleep."""
    time.sleep(max(_last_work_end_s + _SETTLE_S - time.monotonic(), 0))
    until_s = _last_work_end_s + _SETTLE_LIMIT_S
    while time.monotonic() < until_s and not _are_threads_asleep():
        time.sleep(_POLL_S)


def _are_threads_asleep() -> bool:
    """Return whether all threads of libraries sleep. They have names of their own."""
    for task in _THREADS_DIRECTORY.iterdir() if _THREADS_DIRECTORY.is_dir() else ():
        with suppress(OSError):  # the thread has ended
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
        lock._at_fork_reinit()  # type: ignore[union-attr]  # the standard library does the same with its own locks
    for owner in _reset_owners:
        owner.reset_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork_in_child,
    )
