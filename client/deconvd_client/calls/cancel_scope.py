"""Cancellation from another thread: it ends what a call waits for.

A thread that waits for a socket, for gRPC or for a queue cannot be interrupted from outside. So each of these waits
attaches a function that ends it to the scope of its call::

    the thread of the call                            any other thread
    ----------------------                            ----------------
    current_cancel_scope.set(scope)
    Deadline(...) refers to the scope
    attach(connection.abort)
    wait for the connection                           scope.cancel()
                                 <--------------------- connection.abort()
    detach(connection.abort)
    raise CallCancelledError
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from deconvd.errors import CallCancelledError
from deconvd.host.forks import new_lock

__all__ = ["CancelScope", "abort_on_cancel", "current_cancel_scope", "fail_on_cancel"]


class CancelScope:
    """The calls that one function makes. Any thread can cancel them. Thread-safe.

    Attributes:
        is_cancelled: Whether `cancel` was called. Then every wait of a call ends at once.
    """

    def __init__(self) -> None:
        self.is_cancelled: bool = False
        self.began_s: float = time.monotonic()
        self._reason = ""
        self._is_time_counted = False
        self._lock = new_lock()
        self._aborts: list[Callable[[], object]] = []

    def cancel(self, reason: str = "the call was cancelled") -> None:
        """End the calls with CallCancelledError. It has no effect on those that have ended."""
        with self._lock:
            self._reason = self._reason or reason
            self.is_cancelled = True
            # With the lock held, so that `detach` waits: a connection that has returned to its pool must not be
            # aborted. None of the functions waits for anything.
            for abort in self._aborts:
                abort()

    def check(self) -> None:
        """Raise CallCancelledError if `cancel` was called."""
        if self.is_cancelled:
            raise self.make_error()

    def make_error(self) -> CallCancelledError:
        """Return the error of a call that was cancelled."""
        return CallCancelledError(self._reason)

    def attach(self, abort: Callable[[], object]) -> None:
        """Have a function called by `cancel`; at once if that was called already. It must neither wait nor raise."""
        with self._lock:
            self._aborts.append(abort)
            if self.is_cancelled:
                abort()

    def detach(self, abort: Callable[[], object]) -> None:
        """Undo `attach`. The function is not called any more, also not by a `cancel` that is running now."""
        with self._lock:
            self._aborts.remove(abort)

    def take_begin_s(self) -> float | None:
        """Return when the scope was made, to the first who asks; None to others.

        The first call counts its time from then: it may have waited for its turn. Later calls begin later.
        """
        with self._lock:
            is_first, self._is_time_counted = not self._is_time_counted, True
        return self.began_s if is_first else None


current_cancel_scope: Final[ContextVar[CancelScope | None]] = ContextVar(
    "current_cancel_scope", default=None
)
"""The scope that calls of the current thread or task belong to. None for calls that nobody can cancel."""


@contextmanager
def abort_on_cancel(scope: CancelScope | None, abort: Callable[[], object]) -> Iterator[None]:
    """Have `abort` called if the scope is cancelled during the block."""
    if scope is None:
        yield
        return
    scope.attach(abort)
    try:
        yield
    finally:
        scope.detach(abort)


@contextmanager
def fail_on_cancel(
    scope: CancelScope | None, fail: Callable[[CallCancelledError], object]
) -> Iterator[None]:
    """Have `fail` called with the error of the call if the scope is cancelled during the block."""
    if scope is None:
        yield
        return
    with abort_on_cancel(scope, lambda: fail(scope.make_error())):
        yield
