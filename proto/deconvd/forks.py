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
    "UnforkedWork",
    "begin_anew_in_children",
    "leave_to_parent",
    "new_lock",
    "new_reentrant_lock",
]

_PATIENCE_S: Final = 2.0
"""How long a fork waits for work under way: what takes longer is rather not waited for."""

_SETTLED_S: Final = 0.005
_SETTLE_LIMIT_S: Final = 0.1
"""How long threads that are not ours (gRPC's) usually go on after it has ended, and for how long they may."""

_POLL_S: Final = 0.001

_TASKS: Final = Path("/proc/self/task")
"""Where Linux tells of threads."""


class _BeginsAnew(Protocol):
    def begin_anew_in_child(self) -> None: ...


_NAME: Final = (_TASKS.parent / "comm").read_text().strip() if _TASKS.is_dir() else ""
"""The process's, and that of its first thread and of Python's."""

_owners: Final[weakref.WeakSet[_BeginsAnew]] = weakref.WeakSet()
_locks: Final[weakref.WeakSet[threading.Lock | threading.RLock]] = weakref.WeakSet()
_parents: Final[list[object]] = []
_under_way: Final[set[UnforkedWork]] = set()
_forking: Final[set[int]] = set()
"""Threads that are about to fork."""

_ended_s = -_SETTLE_LIMIT_S
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


def begin_anew_in_children(owner: _BeginsAnew) -> None:
    """Have `begin_anew_in_child` of an object, referred to weakly, called in each child that is forked from now on.

    It is called before the child does anything else, with no lock of `new_lock` held.
    """
    _owners.add(owner)


def leave_to_parent(thing: object) -> None:
    """Keep something of the parent's for ever, in a child: its finalizer would wait for threads that are not here."""
    _parents.append(thing)


class UnforkedWork(AbstractContextManager[None]):
    """A block that forks wait for, for a while, and that waits while another thread forks.

    For threads that no signal handler runs in.
    """

    def __enter__(self) -> None:
        while True:
            # first said, then looked: `_before` does it in the other order
            _under_way.add(self)
            if not _forking:
                return
            _under_way.discard(self)
            time.sleep(_POLL_S)

    def __exit__(self, *_: object) -> None:
        global _ended_s  # noqa: PLW0603 - forks happen to the process, not to an object
        _ended_s = time.monotonic()
        _under_way.discard(self)


def _before() -> None:
    _forking.add(threading.get_ident())
    until_s = time.monotonic() + _PATIENCE_S
    while _under_way and time.monotonic() < until_s:
        time.sleep(_POLL_S)
    _settle()


def _settle() -> None:
    """Wait until threads of libraries have done what comes after work."""
    time.sleep(max(_ended_s + _SETTLED_S - time.monotonic(), 0))
    until_s = _ended_s + _SETTLE_LIMIT_S
    while time.monotonic() < until_s and not _are_asleep():
        time.sleep(_POLL_S)


def _are_asleep() -> bool:
    """Return whether all threads sleep that have a name of their own, as those of libraries have."""
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        with suppress(OSError):  # it has ended
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(") ")
            if name != _NAME and rest.startswith("R"):
                return False
    return True


def _after_in_parent() -> None:
    _forking.discard(threading.get_ident())


def _after_in_child() -> None:
    _forking.clear()
    _under_way.clear()
    for lock in _locks:
        lock._at_fork_reinit()  # type: ignore[union-attr]  # as the standard library's own modules do
    for owner in _owners:
        owner.begin_anew_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
    )
