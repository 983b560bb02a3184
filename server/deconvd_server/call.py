"""One caller's claim on the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

from deconvd.errors import CallCancelledError, DeadlineError
from deconvd_server.ledger import Ledger

__all__ = ["Call", "CallerGoneError"]


class CallerGoneError(Exception):
    """The caller has gone, as its transport found out: nobody is there to be told what comes of the call."""


class Call:
    """One caller's claim on the server: it ends at its deadline, or when the caller goes.

    Whoever works for a call asks `check` between steps, so that no work is done for nobody.

    Attributes:
        peer: Who calls, for the log.
        ledger: Where its time goes.
        tenant: On whose behalf it is, if it belongs to a session; None if not.

    Args:
        timeout_s: Seconds until the deadline; None for no deadline.
    """

    def __init__(self, timeout_s: float | None = None, peer: str = "") -> None:
        self.peer = peer
        self.ledger = Ledger()
        self.tenant: object = None
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: list[Callable[[], None]] = []

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller has gone."""
        return self._cancelled

    def cancel(self) -> None:
        """Note that the caller has gone, and tell those who asked by `on_cancel`."""
        with self._lock:
            self._cancelled = True
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the caller goes: at once if it has gone already."""
        with self._lock:
            if not self._cancelled:
                self._callbacks.append(callback)
                return
        callback()

    def forget(self, callback: Callable[[], None]) -> None:
        """Have a callback not be called that `on_cancel` was given, unless it has been."""
        with self._lock, suppress(ValueError):
            self._callbacks.remove(callback)

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline, 0 once it has passed; None if there is none."""
        if self._deadline_s is None:
            return None
        return max(self._deadline_s - time.monotonic(), 0.0)

    def check(self) -> None:
        """Return if the work is still wanted.

        Raises:
            CallCancelledError: The caller has gone.
            DeadlineError: The deadline has passed.
        """
        if self._cancelled:
            raise CallCancelledError("the caller gave the call up")
        if self.remaining_s() == 0:
            raise DeadlineError("the call's deadline passed before its work was done")
