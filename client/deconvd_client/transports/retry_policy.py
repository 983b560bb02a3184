"""Which failed calls are tried again, and when."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError, UnavailableError
from deconvd_client.calls.deadline import Deadline

__all__ = ["PinnedTransportError", "RetryPolicy"]

_T = TypeVar("_T")

_FIRST_BACKOFF_S: Final = 0.05
"""The longest pause before the first retry."""

_MAX_BACKOFF_S: Final = 1.0
"""The longest pause before any retry."""

_BACKOFF_FACTOR: Final = 2

_FIRST_CONTACT_TIMEOUT_S: Final = 5.0
"""How long calls wait for a server that has never answered: more likely there is none than that it is starting."""

_MIN_RETRY_S: Final = 0.02
"""If less time is left than this, a call is not tried again."""

_CLOSE_CHECK_INTERVAL_S: Final = 0.1
"""How often a call checks during a pause whether its connection was closed."""


class PinnedTransportError(UnavailableError):
    """The only transport that the caller allows is not available. A retry would not help."""


class RetryPolicy:
    """Retries the calls of a connection until their deadlines. Thread-safe.

    A server that was reached before may be restarting, so calls are retried until the deadline. If the server says
    when to come back (`UnavailableError.retry_after_s`), no retry is made before that. If it has never answered, calls
    fail after 5 seconds. A server that stops ends calls that it has received, but not begun, with CANCELLED: these are
    retried, too.

    Args:
        fail_fast: Whether a call fails at once if the server cannot be reached.
    """

    def __init__(self, *, fail_fast: bool = False) -> None:
        self._fail_fast = fail_fast
        self._was_reached = False
        self._is_closed = False

    def run(self, attempt: Callable[[], _T], deadline: Deadline) -> _T:
        """Return what `attempt` returns; try again if that may help.

        Raises:
            DeadlineError: The deadline passed in the first attempt. The message names the option to change.
            DeconvdError: The error of the last attempt that the deadline did not cut short.
        """
        contact_s = time.monotonic() + _FIRST_CONTACT_TIMEOUT_S
        backoff_s = _FIRST_BACKOFF_S
        unavailable: DeconvdError | None = None
        while True:
            try:
                returned = attempt()
                self._was_reached = True
                return returned
            except DeadlineError as error:
                if unavailable is None:
                    raise _with_limit(error, deadline) from None
                try:
                    raise unavailable from None  # it says more than that the last attempt was cut short
                finally:
                    del (
                        unavailable
                    )  # its traceback refers to this frame: a cycle, which would keep the arrays
            except (UnavailableError, CallCancelledError) as error:
                pause_s = self._pause_s(error, backoff_s, deadline, contact_s)
                if pause_s is None:
                    raise
                unavailable = error.with_traceback(
                    None
                )  # without the frames, which refer to the caller's arrays
            except DeconvdError:  # the answer of a server
                self._was_reached = True
                raise
            self._sleep(pause_s)
            backoff_s = min(backoff_s * _BACKOFF_FACTOR, _MAX_BACKOFF_S)

    def run_once(self, attempt: Callable[[], _T], deadline: Deadline) -> _T:
        """Return what `attempt` returns, without a retry. Raises as `run` does."""
        try:
            return attempt()
        except DeadlineError as error:
            raise _with_limit(error, deadline) from None

    def stop(self) -> None:
        """Retry nothing from now on: the connection is closed."""
        self._is_closed = True

    def _pause_s(
        self, error: DeconvdError, backoff_s: float, deadline: Deadline, contact_s: float
    ) -> float | None:
        """Return how many seconds to wait before the next attempt; None if there must be none.

        Args:
            contact_s: When calls stop waiting for a server that has never answered, on the monotonic clock.
        """
        if self._is_closed or isinstance(error, PinnedTransportError):
            return None
        # random, so that many callers do not come back at the same time
        pause_s = random.uniform(backoff_s / 2, backoff_s)  # noqa: S311 - no secret
        if isinstance(error, UnavailableError) and error.was_reached:
            self._was_reached = True
            pause_s += error.retry_after_s or 0
            return pause_s if pause_s < deadline.remaining_s() else None
        if self._fail_fast and isinstance(error, UnavailableError):
            return None
        # the last pause is cut short, so that time is left for one more attempt
        left_s = deadline.remaining_s()
        if not self._was_reached:
            left_s = min(left_s, contact_s - time.monotonic())
        return min(pause_s, left_s / 2) if left_s >= _MIN_RETRY_S else None

    def _sleep(self, pause_s: float) -> None:
        until_s = time.monotonic() + pause_s
        while not self._is_closed and (left_s := until_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _CLOSE_CHECK_INTERVAL_S))


def _with_limit(error: DeadlineError, deadline: Deadline) -> DeadlineError:
    """Return the error with the limit that was exceeded, and the options that raise it."""
    return DeadlineError(
        f"the call took longer than the {deadline.timeout_s:g} s that timeout_s of connect() allows "
        f"(--timeout-s of the command): {error}"
    )
