"""Striped calls on the connections of a `DirectTransport`. See `deconvd.direct.protocol`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.direct.events import Answer
from deconvd.direct.frame_stream import FrameStream
from deconvd.errors import ExhaustedError, UnavailableError, UnimplementedError
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd.host.system import processors_count
from deconvd_client.calls.cancel_scope import abort_on_cancel
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.transport import (
    NotServedDirectlyError,
    OutcomeUnknownError,
    StripedAttempt,
)
from deconvd_client.calls.uninterrupted import run_in_background
from deconvd_client.transports.backoff import Backoff
from deconvd_client.transports.direct.pool import DirectTransport
from deconvd_client.transports.direct.striped_call import run_striped_call
from deconvd_client.transports.direct.striping_policy import StripingPolicy

__all__ = ["StripedTransport"]

_MIN_STRIPES_COUNT: Final = 2
"""With fewer connections a call goes another way: a stream sends and receives at once, and one stripe does not."""

_PATIENCE_S: Final = 0.1
"""How long a call waits for connections that are being opened, before it makes do with those that are there."""

_MAX_OPENING_COUNT: Final = 16
"""How many connections are opened at the same time."""

_FIRST_PAUSE_S: Final = 1.0
"""How long nothing is tried after a first failure."""

_log = logging.getLogger(__name__)


class StripedTransport:
    """Makes calls whose elements travel over several direct connections at once. Thread-safe.

    Args:
        direct: Has the connections.

    Attributes:
        policy: Says which calls are striped, and over how many connections.
    """

    def __init__(self, direct: DirectTransport) -> None:
        self.policy: StripingPolicy = StripingPolicy(processors_count)
        self._direct = direct
        self._backoff = Backoff(_FIRST_PAUSE_S)
        self._opening_backoff = Backoff(_FIRST_PAUSE_S)
        self._lock = new_lock()
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Open no connections, as in a forked child."""
        self._opening_count = 0

    @property
    def may_carry(self) -> bool:
        """Whether a striped call may be tried: the last one succeeded, or was long ago."""
        return self._direct.may_carry and not self._backoff.is_pending

    def call(
        self,
        begin: Callable[[], StripedAttempt],
        deadline: Deadline,
        stripes_count: int,
    ) -> Answer:
        """Make a call, and return its answer. The results are in the memory of the attempt.

        Args:
            begin: Begins the attempt. Called once the connections are there.
            stripes_count: How many stripes to use, or fewer if there are too few connections.

        Raises:
            NotServedDirectlyError: The call must be made in another way: there are too few connections, a stripe broke,
                or the server refuses such calls.
            DeconvdError: What the server raised.
            DeadlineError: There was no answer in time.
            CallCancelledError: The transport was closed meanwhile.
        """
        try:
            answer = self._call_once(begin, deadline, stripes_count)
        except ExhaustedError as error:  # a stream needs less memory
            raise NotServedDirectlyError(str(error)) from None
        except (UnavailableError, UnimplementedError, OutcomeUnknownError) as error:
            _log.debug("a call was not striped: %s", error)
            with self._lock:
                self._backoff.note_failure()
            raise NotServedDirectlyError(str(error)) from None
        with self._lock:
            self._backoff.note_success()
        self.policy.limit_stripes(answer.stripes_limit)
        return answer

    def _call_once(
        self,
        begin: Callable[[], StripedAttempt],
        deadline: Deadline,
        stripes_count: int,
    ) -> Answer:
        with self._direct.pooled_connection(deadline) as pooled:
            patience = deadline.with_limit(_PATIENCE_S)
            stripes = self._acquire(stripes_count, patience)
            if len(stripes) < _MIN_STRIPES_COUNT:
                for stripe in stripes:
                    self._direct.take_back(stripe, None)
                raise NotServedDirectlyError("there are too few connections for stripes")
            timeout_s = deadline.remaining_s()
            try:
                for stripe in stripes:
                    stripe.set_deadline(timeout_s)
                with abort_on_cancel(deadline.scope, partial(_abort_all, stripes)):
                    answer = run_striped_call(pooled.connection, stripes, begin(), timeout_s)
            except BaseException as error:
                for stripe in stripes:
                    self._direct.discard(stripe, error)
                raise
            for stripe in stripes:
                self._direct.take_back(stripe, None)
            return answer

    def _acquire(self, count: int, patience: Deadline) -> list[FrameStream]:
        """Return up to `count` connections. Those that are missing are opened, for later calls if they take long."""
        connections: list[FrameStream] = []
        while len(connections) < count and (idle := self._direct.acquire_idle()) is not None:
            connections.append(idle)
        missing_count = count - len(connections)
        if not missing_count or not self._may_open:
            return connections
        arrivals: SimpleQueue[None] = SimpleQueue()
        run_in_background(partial(self._open_all, missing_count, arrivals))
        try:
            for _ in range(missing_count):
                with abort_on_cancel(patience.scope, partial(arrivals.put, None)):
                    arrivals.get(timeout=patience.remaining_s())
                patience.check_cancelled()
                if (opened := self._direct.acquire_idle()) is not None:
                    connections.append(opened)
        except Empty:
            pass  # the others come too late for this call
        return connections

    @property
    def _may_open(self) -> bool:
        return self._direct.may_connect and not self._opening_backoff.is_pending

    def _open_all(self, count: int, arrivals: SimpleQueue[None]) -> None:
        """Open connections at the same time. Each puts an item into `arrivals`, whether it was opened or not.

        This runs in a background thread, where no interrupt leaves the count wrong.
        """
        with self._lock:
            opening_count = min(count, _MAX_OPENING_COUNT - self._opening_count)
            self._opening_count += opening_count
        for _ in range(count - opening_count):
            arrivals.put(None)
        for _ in range(opening_count):
            run_in_background(partial(self._open_one, arrivals))

    def _open_one(self, arrivals: SimpleQueue[None]) -> None:
        is_open = self._direct.open_idle()
        with self._lock:
            self._opening_count -= 1
            if is_open:
                self._opening_backoff.note_success()
            else:
                self._opening_backoff.note_failure()
        arrivals.put(None)


def _abort_all(stripes: Iterable[FrameStream]) -> None:
    for stripe in stripes:
        stripe.abort()
