"""Operands that their client is still writing into shared memory while its call is served. See `direct_protocol`."""

from __future__ import annotations

import time
from typing import Final

from deconvd.line import Line, hear_written

__all__ = ["LateError", "Writing"]

_GRACE_S: Final = 5e-3
_SLOWEST_BYTES_PER_S: Final = 2e9
"""What a client may take to write whose call has a device meanwhile: to begin with, and by its bytes."""

_HEARD_S: Final = 1e-3
"""Longer than it takes to hear all that an honest client says."""


class LateError(Exception):
    """Operands were not written in the time that a call may keep others from a device."""


class Writing:
    """How far a client has come with writing the operands of a call. For the thread that serves its line.

    What it says may be wrong: that harms its own results alone. Each method raises LineBrokenError
    if the client goes, or says something else.

    Args:
        written_bytes: How many bytes it has written already.

    Attributes:
        total_bytes: What it writes: all operands in shared memory, one behind the other (see `direct_protocol`).
        waited_s: Seconds that were spent in `expect`.
    """

    def __init__(self, line: Line, written_bytes: int = 0) -> None:
        self.total_bytes = 0
        self.waited_s = 0.0
        self._line = line
        self._written_bytes = written_bytes
        self._fair_until_s: float | None = None

    def is_done(self) -> bool:
        """Return whether all is known to be there now."""
        return self.has_within(0, self.total_bytes)

    def require(self) -> None:
        """Raise LateError unless all is known to be there now."""
        if not self.is_done():
            raise LateError

    def expect(self, size_bytes: int) -> None:
        """Wait for so many bytes, while holding a device.

        Raises:
            LateError: That would be unfair to others: the device is to be left, and taken again once
                all has been written.
        """
        now_s = time.monotonic()
        if self._fair_until_s is None:
            self._fair_until_s = now_s + _GRACE_S + self.total_bytes / _SLOWEST_BYTES_PER_S
        is_there = self.has_within(self._fair_until_s - now_s, size_bytes)
        self.waited_s += time.monotonic() - now_s
        if not is_there:
            raise LateError

    def has_within(self, timeout_s: float, size_bytes: int) -> bool:
        """Return whether so many bytes are there within so many seconds."""
        until_s = time.monotonic() + timeout_s
        while self._written_bytes < size_bytes:
            remaining_s = until_s - time.monotonic()
            # what was said by then is still heard, but not for ever: there may always be more
            written_bytes = (
                hear_written(self._line, remaining_s) if remaining_s > -_HEARD_S else None
            )
            if written_bytes is None:
                return False
            self._written_bytes = written_bytes
        return True
