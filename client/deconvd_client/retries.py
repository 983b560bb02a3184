"""What is tried again, how often and after how long: for gRPC, and for streams, which gRPC would have to keep whole."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from deconvd.errors import CallCancelledError, UnavailableError

__all__ = ["service_config", "with_retries"]

_T = TypeVar("_T")

_ATTEMPTS_COUNT: Final = 5
_FIRST_BACKOFF_S: Final = 0.1
_MAX_BACKOFF_S: Final = 2.0
_BACKOFF_FACTOR: Final = 2


def service_config(service: str, methods: list[str]) -> dict[str, Any]:
    """Return a gRPC service config that retries these methods.

    A server that stops ends calls that it has received, but not begun, with CANCELLED.
    """
    policy = {
        "maxAttempts": _ATTEMPTS_COUNT,
        "initialBackoff": f"{_FIRST_BACKOFF_S}s",
        "maxBackoff": f"{_MAX_BACKOFF_S}s",
        "backoffMultiplier": _BACKOFF_FACTOR,
        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
    }
    names = [{"service": service, "method": method} for method in methods]
    return {"methodConfig": [{"name": names, "retryPolicy": policy}]}


def with_retries(
    attempt: Callable[[float], _T], *, timeout_s: float, is_closed: Callable[[], bool]
) -> _T:
    """Return what `attempt` returns, trying it again as gRPC does for the methods above.

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
            # gRPC too waits for a random part, so that many callers do not come back at once
            pause_s = random.uniform(0, backoff_s)
            if is_closed() or time.monotonic() + pause_s >= deadline_s:
                raise
        time.sleep(pause_s)
        backoff_s = min(backoff_s * _BACKOFF_FACTOR, _MAX_BACKOFF_S)
    return attempt(deadline_s - time.monotonic())
