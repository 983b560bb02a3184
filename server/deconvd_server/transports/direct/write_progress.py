"""The progress of operands that their client is still writing into shared memory. See `deconvd.direct.protocol`."""

from __future__ import annotations

import math
import time
from typing import Final

from deconvd.direct.frame_stream import FrameStream, receive_progress
from deconvd.errors import UnavailableError
from deconvd_server.call.context import STALL_LIMIT_S

__all__ = ["WriteProgress"]

_DRAIN_S: Final = 1e-3
"""Longer than it takes to read all reports that an honest client has sent."""

_RETRY_AFTER_S: Final = 0.1
"""When a client that has stopped writing may try again: soon, as it did not wait for the server."""


class WriteProgress:
    """How many bytes of a call's operands the client has written. See `ArrivalProgress`.

    Only the thread that serves the connection may use it. A client that reports more than it has written spoils its
    own results alone.

    Attributes:
        blocked_since_s: As in `ClientWait`.

    Args:
        written_bytes: How many bytes the client had written when it sent the call.
    """

    def __init__(self, frames: FrameStream, written_bytes: int = 0) -> None:
        self._frames = frames
        self._written_bytes = written_bytes
        self._progressed_s = time.monotonic()
        self.blocked_since_s = math.inf

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """Wait until that many bytes are written, or the time is up; return whether they are.

        Raises:
            ConnectionBrokenError: The client has gone, or sends something else.
            UnavailableError: The client has written nothing for `STALL_LIMIT_S`.
        """
        until_s = time.monotonic() + timeout_s
        while self._written_bytes < size_bytes:
            remaining_s = until_s - time.monotonic()
            # Reports that came in time are still read when time is up. But not for ever: a client may send without end.
            written_bytes = (
                receive_progress(self._frames, remaining_s) if remaining_s > -_DRAIN_S else None
            )
            if written_bytes is None:
                self._check_progress()
                self.blocked_since_s = self._progressed_s
                return False
            if written_bytes > self._written_bytes:
                self._progressed_s = time.monotonic()
            self._written_bytes = written_bytes
        self.blocked_since_s = math.inf
        return True

    def _check_progress(self) -> None:
        if time.monotonic() - self._progressed_s > STALL_LIMIT_S:
            raise UnavailableError(
                f"the client has written nothing of the call's operands for {STALL_LIMIT_S:g} s: "
                f"{self._written_bytes} bytes are there",
                retry_after_s=_RETRY_AFTER_S,
            )
