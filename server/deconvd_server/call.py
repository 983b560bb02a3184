"""One caller's claim on the server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from deconvd.errors import CallCancelledError, DeadlineError
from deconvd_server.ledger import Ledger
from deconvd_server.writing import Writing

__all__ = ["Call"]

_LOOK_S: Final = 0.5
"""How often one who waits for operands looks whether the call is still wanted."""


class Call:
    """One caller's claim on the server: it ends at its deadline, or when the caller goes.

    Whoever works for a call asks `check` between steps, so that no work is done for nobody.

    Attributes:
        peer: Who calls, for the log.
        ledger: Where its time goes.
        tenant: On whose behalf it is, if it belongs to a session; None if not.
        writing: How far its operands are written, if it is early; None if they are there.

    Args:
        timeout_s: Seconds until the deadline; None for no deadline.
    """

    def __init__(self, timeout_s: float | None = None, peer: str = "") -> None:
        self.peer = peer
        self.ledger = Ledger()
        self.tenant: object = None
        self.writing: Writing | None = None
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

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline, 0 once it has passed; None if there is none."""
        if self._deadline_s is None:
            return None
        return max(self._deadline_s - time.monotonic(), 0.0)

    def wait_until_written(self) -> None:
        """Return once all operands have been written: at once unless the call is early.

        Raises:
            CallCancelledError, DeadlineError: As `check`.
            LineBrokenError: The client has gone.
        """
        if self.writing is None:
            return
        while True:
            self.check()
            remaining_s = self.remaining_s()
            wait_s = _LOOK_S if remaining_s is None else min(remaining_s, _LOOK_S)
            if self.writing.has_within(wait_s, self.writing.total_bytes):
                self.writing = None
                return

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
