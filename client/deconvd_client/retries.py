"""What is tried again, how often and after how long."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from deconvd.errors import CallCancelledError, UnavailableError

__all__ = ["with_retries"]

_T = TypeVar("_T")

_ATTEMPTS_COUNT: Final = 5
_FIRST_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 2.0
_BACKOFF_FACTOR: Final = 2


def with_retries(
    attempt: Callable[[float], _T], *, timeout_s: float, is_closed: Callable[[], bool]
) -> _T:
    """Return what `attempt` returns, trying it again if the server is not there or full.

    A server that stops ends calls that it has received, but not begun, with CANCELLED: these too.

    Args:
        attempt: Is given the seconds that are left of `timeout_s`.
        is_closed: Whether the caller has closed the connection, so that it is not tried again.

    Raises:
        DeconvdError: What the last attempt raised.
    """
    deadline_s = time.monotonic() + timeout_s
    backoff_s = _FIRST_BACKOFF_S
    for _ in range(_ATTEMPTS_COUNT - 1):
        try:
            return attempt(deadline_s - time.monotonic())
        except (UnavailableError, CallCancelledError):
            # a random part, so that many callers do not come back at once
            pause_s = random.uniform(0, backoff_s)
            if is_closed() or time.monotonic() + pause_s >= deadline_s:
                raise
        time.sleep(pause_s)
        backoff_s = min(backoff_s * _BACKOFF_FACTOR, _MAX_BACKOFF_S)
    return attempt(deadline_s - time.monotonic())
