"""Operands that their client is still writing into shared memory while its call is served. See `deconvd.direct`."""

from __future__ import annotations

import time
from typing import Final

from deconvd.direct import hear_written
from deconvd.line import Line

__all__ = ["LateError", "Writing"]

_GRACE_S: Final = 5e-3
_SLOWEST_BYTES_PER_S: Final = 2e9
"""What a client may take to write whose call has a device meanwhile: to begin with, and by its bytes."""

_HEARD_S: Final = 1e-3
"""Longer than it takes to hear all that an honest client says."""


class LateError(Exception):
    """Operands were not written in the time that a call may keep others from a device."""


class Writing:
    """How far a client has come with writing x, and what it writes before. For the thread that serves its line.

    What it says may be wrong: that harms its own results alone. Each method raises LineBrokenError
    if the client goes, or says something else.

    Args:
        written_bytes: How many bytes it has written already.

    Attributes:
        before_bytes: What it writes before x: of x there is nothing until all of that is there.
        waited_s: Seconds that were spent in `expect`.
    """

    def __init__(self, line: Line, written_bytes: int = 0) -> None:
        self.before_bytes = 0
        self.waited_s = 0.0
        self._line = line
        self._written_bytes = written_bytes
        self._fair_until_s: float | None = None

    def has(self, size_bytes: int) -> bool:
        """Return whether so many bytes of x, from its begin, are known to be there now."""
        return self.has_within(0, size_bytes)

    def require(self, size_bytes: int) -> None:
        """Raise LateError unless so many bytes are known to be there now."""
        if not self.has(size_bytes):
            raise LateError

    def expect_before(self, size_bytes: int, x_bytes: int) -> None:
        """Wait for so many bytes of what is written before x. Otherwise as `expect`."""
        self.expect(size_bytes - self.before_bytes, x_bytes)

    def expect(self, size_bytes: int, x_bytes: int) -> None:
        """Wait for so many of x's bytes, and all before, while holding a device.

        Raises:
            LateError: That would be unfair to others: the device is to be left, and taken again once
                all has been written.
        """
        now_s = time.monotonic()
        if self._fair_until_s is None:
            total_bytes = self.before_bytes + x_bytes
            self._fair_until_s = now_s + _GRACE_S + total_bytes / _SLOWEST_BYTES_PER_S
        is_there = self.has_within(self._fair_until_s - now_s, size_bytes)
        self.waited_s += time.monotonic() - now_s
        if not is_there:
            raise LateError

    def has_within(self, timeout_s: float, size_bytes: int) -> bool:
        """Return whether so many bytes of x, from its begin, are there within so many seconds."""
        until_s = time.monotonic() + timeout_s
        while self._written_bytes < self.before_bytes + size_bytes:
            remaining_s = until_s - time.monotonic()
            # what was said by then is still heard, but not for ever: there may always be more
            written_bytes = (
                hear_written(self._line, remaining_s) if remaining_s > -_HEARD_S else None
            )
            if written_bytes is None:
                return False
            self._written_bytes = written_bytes
        return True
