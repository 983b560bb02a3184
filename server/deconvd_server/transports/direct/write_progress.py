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
"""Longer than it takes to hear all that an honest client says."""

_RETRY_AFTER_S: Final = 0.1
"""What a client is told that has stopped writing: it may try again at once, as the server is ready."""


class WriteProgress:
    """How far a client has come with writing the operands of a call. See `Progress`.

    For the thread that serves its line. What the client says may be wrong: that harms its own results
    alone.

    Attributes:
        blocked_since_s: As in `ClientWait`.

    Args:
        written_bytes: How many bytes it has written already.
    """

    def __init__(self, line: FrameStream, written_bytes: int = 0) -> None:
        self._frames = line
        self._written_bytes = written_bytes
        self._progressed_s = time.monotonic()
        self.blocked_since_s = math.inf

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """Return whether that many bytes are there, as soon as they are, or once the time is up.

        Raises:
            ConnectionBrokenError: The client goes, or says something else.
            UnavailableError: It has written nothing for so long that it is not waited for.
        """
        until_s = time.monotonic() + timeout_s
        while self._written_bytes < size_bytes:
            remaining_s = until_s - time.monotonic()
            # what was said by then is still heard, but not for ever: there may always be more
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
