"""Which failed calls are tried again, and when."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final, TypeVar

from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError, UnavailableError
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.tracing import current_call_span
from deconvd_client.calls.transport import TlsFailureError

__all__ = [
    "ForkedChildError",
    "NoRetries",
    "PinnedTransportError",
    "RetriedElsewhere",
    "RetryPolicy",
    "SingleRound",
    "WorkerAwayError",
    "name_limit",
]

_T = TypeVar("_T")

_FIRST_BACKOFF_S: Final = 0.05
"""The longest pause before the first retry."""

_MAX_BACKOFF_S: Final = 1.0
"""The longest pause before any retry."""

_BACKOFF_FACTOR: Final = 2

_TOLD_SPREAD_S: Final = 0.05
"""Over which time at least calls come back that the server has told to come back at the same moment."""

_MOST_TOLD_SPREAD_S: Final = 1.0
"""Over which time at most they do, beyond that."""

_FIRST_CONTACT_TIMEOUT_S: Final = 5.0
"""How long calls wait for a server that has never answered: more likely there is none than that it is starting."""

_ELSEWHERE_S: Final = 0.2
"""When to come back to a server for what one of its workers alone has, which cannot be reached."""

_MIN_RETRY_S: Final = 0.02
"""If less time is left than this, a call is not tried again."""

_CLOSE_CHECK_INTERVAL_S: Final = 0.1
"""How often a call checks during a pause whether it was cancelled, or its connection closed."""


class PinnedTransportError(UnavailableError):
    """The only transport that the caller allows is not available. A retry would not help."""


class ForkedChildError(UnavailableError):
    """A forked child wants what only its parent's connection has. No server has failed, and none could help."""


class WorkerAwayError(UnavailableError):
    """One worker alone could serve the call, and cannot be reached, though others of its server can."""


_PERMANENT_ERRORS: Final = (PinnedTransportError, TlsFailureError, ForkedChildError)
"""Errors that a retry would meet again."""


class RetryPolicy:
    """Retries the calls of a connection until their deadlines. Thread-safe.

    A server that was reached before may be restarting, so calls are retried until the deadline. If the server says
    when to come back (`UnavailableError.retry_after_s`), no retry is made before that, and no further call of the
    connection begins: calls that were just served would else take the places of those that were refused. If it has
    never answered, calls fail after 5 seconds. A server that stops ends calls that it has received, but not begun, with
    CANCELLED: these are retried, too.

    Args:
        fail_fast: Whether a call fails at once if the server cannot be reached.
    """

    def __init__(self, *, fail_fast: bool = False) -> None:
        self._fail_fast = fail_fast
        self._was_reached = False
        self._is_closed = False
        self._full_until_s = 0.0  # when the server expects calls again; 0 if it has not said

    def run(
        self, attempt: Callable[[], _T], deadline: Deadline, *, waits_while_full: bool = True
    ) -> _T:
        """Return what `attempt` returns; try again if that may help.

        Args:
            waits_while_full: Whether to wait at first if the server has told another call to come back later.

        Raises:
            DeadlineError: The deadline passed in the first attempt. The message names the option to change.
            DeconvdError: The error of the last attempt that the deadline did not cut short.
        """
        contact_s = time.monotonic() + _FIRST_CONTACT_TIMEOUT_S
        backoff_s = _FIRST_BACKOFF_S
        unavailable: DeconvdError | None = None
        if self._full_until_s and waits_while_full:
            self._wait_while_full(deadline)
        while True:
            try:
                returned = attempt()
                self._was_reached = True
                return returned
            except DeadlineError as error:
                if unavailable is None:
                    raise name_limit(error, deadline) from None
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
                if (span := current_call_span.get()) is not None:
                    span.note_retry(unavailable)
            except DeconvdError:  # the answer of a server
                self._was_reached = True
                raise
            self._sleep(pause_s, deadline)
            backoff_s = min(backoff_s * _BACKOFF_FACTOR, _MAX_BACKOFF_S)

    def run_once(self, attempt: Callable[[], _T], deadline: Deadline) -> _T:
        """Return what `attempt` returns, without a retry. Raises as `run` does."""
        try:
            return attempt()
        except DeadlineError as error:
            raise name_limit(error, deadline) from None

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
        if self._is_closed or deadline.is_cancelled or isinstance(error, _PERMANENT_ERRORS):
            return None
        if isinstance(error, UnavailableError) and error.was_reached:
            self._was_reached = True
            told_s = error.retry_after_s or 0
            if isinstance(error, WorkerAwayError):
                if self._fail_fast:
                    return None
            else:  # it tells nothing of others' calls
                self._full_until_s = time.monotonic() + told_s
            pause_s = _told_pause_s(told_s)
            return pause_s if pause_s < deadline.remaining_s() else None
        # random, so that many callers do not come back at the same time
        pause_s = random.uniform(backoff_s / 2, backoff_s)  # noqa: S311 - no secret
        if self._fail_fast and isinstance(error, UnavailableError):
            return None
        # the last pause is cut short, so that time is left for one more attempt
        left_s = deadline.remaining_s()
        if not self._was_reached:
            left_s = min(left_s, contact_s - time.monotonic())
        return min(pause_s, left_s / 2) if left_s >= _MIN_RETRY_S else None

    def _wait_while_full(self, deadline: Deadline) -> None:
        """Wait as long as a refused call would; not at all if the server expects calls, or the deadline is before."""
        left_s = self._full_until_s - time.monotonic()
        if left_s <= 0:
            self._full_until_s = 0.0
        elif (pause_s := _told_pause_s(left_s)) < deadline.remaining_s():
            self._sleep(pause_s, deadline)

    def _sleep(self, pause_s: float, deadline: Deadline) -> None:
        until_s = time.monotonic() + pause_s
        while (left_s := until_s - time.monotonic()) > 0:
            if self._is_closed or deadline.is_cancelled:
                return
            time.sleep(min(left_s, _CLOSE_CHECK_INTERVAL_S))


class NoRetries(RetryPolicy):
    """Makes each attempt once. For a server beside others, where its caller tries again."""

    def run(
        self, attempt: Callable[[], _T], deadline: Deadline, *, waits_while_full: bool = True
    ) -> _T:
        """Return what `attempt` returns. The policy of its caller knows the deadline."""
        return attempt()

    def run_once(self, attempt: Callable[[], _T], deadline: Deadline) -> _T:
        """Return what `attempt` returns."""
        return attempt()


class RetriedElsewhere(NoRetries):
    """Makes each attempt once, at the workers of a server that is beside others.

    If a call fails that only one worker could serve, its caller must not take the whole server for lost.

    Args:
        serves: Returns whether the server has other workers, which serve.
    """

    def __init__(self, serves: Callable[[], bool]) -> None:
        super().__init__()
        self._serves = serves

    def run(
        self, attempt: Callable[[], _T], deadline: Deadline, *, waits_while_full: bool = True
    ) -> _T:
        """Return what `attempt` returns.

        Raises:
            WorkerAwayError: One worker cannot be reached, but others serve there: then the server counts as reached.
            UnavailableError: As `attempt` does.
        """
        try:
            return attempt()
        except UnavailableError as error:
            if error.was_reached or not self._serves():
                raise
            raise WorkerAwayError(str(error), retry_after_s=_ELSEWHERE_S) from None


class SingleRound(RetryPolicy):
    """Makes each attempt once, as the last one that its caller gets."""

    def run(
        self, attempt: Callable[[], _T], deadline: Deadline, *, waits_while_full: bool = True
    ) -> _T:
        """Return what `attempt` returns. Raises as `RetryPolicy.run_once` does."""
        return self.run_once(attempt, deadline)


def _told_pause_s(told_s: float) -> float:
    """Return how long to wait if the server expects calls again in `told_s` seconds.

    Random, so that many callers who are told the same do not come back at the same time. It does not grow: a server
    that goes on to be full says longer times itself.
    """
    spread_s = random.uniform(_TOLD_SPREAD_S / 2, _TOLD_SPREAD_S)  # noqa: S311 - no secret
    return told_s + spread_s + random.uniform(0, min(told_s / 2, _MOST_TOLD_SPREAD_S))  # noqa: S311 - likewise


def name_limit(error: DeadlineError, deadline: Deadline) -> DeadlineError:
    """Return the error with the limit that was exceeded, and the options that raise it."""
    return DeadlineError(
        f"the call took longer than the {deadline.timeout_s:g} s that timeout_s of connect() allows "
        f"(--timeout-s of the command): {error}"
    )
