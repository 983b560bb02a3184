"""The deadline of a call. It is made once, where the call begins, and passed down to everything that waits."""

from __future__ import annotations

import time

from deconvd_client.calls.cancel_scope import CancelScope, current_cancel_scope

__all__ = ["Deadline"]


class Deadline:
    """The moment by which a call must have ended, and who can end it before.

    If the call waited for its turn in a `CancelScope`, that time counts.

    Attributes:
        timeout_s: How long the call may take in all, in seconds; for messages.
        scope: The scope that the call belongs to. Whatever waits must end once it is cancelled. None for most calls.

    Args:
        timeout_s: Seconds from now.
    """

    __slots__ = ("_at_s", "scope", "timeout_s")

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s: float = timeout_s
        self.scope: CancelScope | None = current_cancel_scope.get()
        begin_s = None if self.scope is None else self.scope.take_begin_s()
        self._at_s = (time.monotonic() if begin_s is None else begin_s) + timeout_s

    def remaining_s(self) -> float:
        """Return how many seconds are left; 0 once the deadline has passed."""
        return max(self._at_s - time.monotonic(), 0.0)

    def with_limit(self, limit_s: float) -> Deadline:
        """Return the earlier of this deadline and the moment `limit_s` seconds from now."""
        limited = Deadline(min(self.remaining_s(), limit_s))
        limited.scope = self.scope
        return limited

    def shield(self) -> Deadline:
        """Return the same deadline for work that others need, too: nobody can cancel it."""
        shielded = Deadline(self.remaining_s())
        shielded.timeout_s, shielded.scope = self.timeout_s, None
        return shielded

    @property
    def is_cancelled(self) -> bool:
        """Whether the call must end now."""
        return self.scope is not None and self.scope.is_cancelled

    def check_cancelled(self) -> None:
        """Raise CallCancelledError if the call must end now."""
        if self.scope is not None:
            self.scope.check()

    def __repr__(self) -> str:
        return f"<Deadline in {self.remaining_s():.3f} s>"
