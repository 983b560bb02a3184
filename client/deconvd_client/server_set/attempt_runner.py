"""Runs a call at one server after another until one has served it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, TypeAlias, TypeVar

from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    InternalError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.wire.ledger import parse_ledger
from deconvd_client.calls.cancel_scope import CancelScope, abort_on_cancel
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.server_set.balancer import Balancer, Member, Preference, RunningAttempt
from deconvd_client.server_set.member_source import MemberSource
from deconvd_client.server_set.monitor import Monitor
from deconvd_client.server_set.replica import Replica
from deconvd_client.transports.retry_policy import ForkedChildError, RetryPolicy

__all__ = ["AttemptRunner", "Search"]

_T = TypeVar("_T")
_R = TypeVar("_R", bound=Replica)

_MAX_PATIENCE: Final = 64.0
_PATIENCE_FACTOR: Final = 2.0
"""A server that was found silent may have been slow: for the same call, the next one may be silent for longer."""

_STOP_PAUSE_S: Final = 0.2
"""How long a server gets no calls that has ended one because it stops, or cannot make it in time."""

_MIN_RETRY_S: Final = 0.02

_Work: TypeAlias = Callable[[_R, Deadline], _T]
"""Makes a call at a server, by a deadline."""


@dataclass(eq=False, slots=True)
class Search(Generic[_R, _T]):
    """The search for a server that serves one call.

    Attributes:
        work: Makes the call.
        preference: Returns where it should be served, as of now.
        size_bytes: Size of its tensors.
        deadline: When its caller must have an answer.
        patience: As of `RunningAttempt`.
        vain: The servers that were tried in vain in this round.
        failures: What they said.
    """

    work: _Work[_R, _T]
    preference: Callable[[], Preference[_R]]
    size_bytes: int
    deadline: Deadline
    patience: float = 1.0
    vain: list[Member[_R]] = field(default_factory=list)
    failures: list[DeconvdError] = field(default_factory=list)

    def begin_round(self) -> list[DeconvdError]:
        """Return what the servers said in this round, and let the next one try all of them again."""
        failures, self.failures = self.failures, []
        self.vain.clear()
        return failures


class AttemptRunner(Generic[_R]):
    """Runs calls at the members of a balancer. Thread-safe.

    A call that fails at one member is made at the next if the first cannot be reached, refuses it, stops, falls silent,
    cannot make it in time, or is too old for it. All calls are computations without effects, so it does not matter
    whether the first has begun. When all have failed, `retries` says whether and when they are tried again.

    Args:
        balancer: Chooses.
        membership: Says which members there are.
        monitor: Is told of calls and failures.
        retries: Begins the next round.
        name_retries: Looks names up again. That one was found does not mean that a server was reached.
        ledgers: Those of the members' calls.
    """

    def __init__(
        self,
        balancer: Balancer[_R],
        membership: MemberSource[_R],
        monitor: Monitor[_R],
        retries: RetryPolicy,
        name_retries: RetryPolicy,
        ledgers: LedgerRecorder,
    ) -> None:
        self._balancer = balancer
        self._membership = membership
        self._monitor = monitor
        self._retries = retries
        self._name_retries = name_retries
        self._ledgers = ledgers
        self._is_closed = False

    def run(
        self,
        work: _Work[_R, _T],
        preference: Callable[[], Preference[_R]],
        size_bytes: int,
        deadline: Deadline,
    ) -> _T:
        """Return what `work` returns at the first server that serves it.

        Args:
            work: Makes the call at a server, once.
            preference: Returns where it should be served. It is asked before each attempt.
            size_bytes: Size of its tensors.
            deadline: When the caller must have an answer.

        Raises:
            DeconvdError: What the last round of attempts raised.
        """
        return self.resume(Search(work, preference, size_bytes, deadline))

    def resume(self, search: Search[_R, _T]) -> _T:
        """Return what the work of a search returns at the first server that serves it, as `run` does."""
        return self._retries.run(lambda: self._try_members(search), search.deadline)

    def note_error(self, search: Search[_R, _T], member: Member[_R], error: DeconvdError) -> bool:
        """Note that the work of a search has raised an error at a member. Return whether to try it at others."""
        attempt = RunningAttempt(search.deadline.scope or CancelScope(), search.size_bytes, 1.0)
        return self._note_error(search, member, attempt, error)

    def wait_for_members(self, deadline: Deadline) -> None:
        """Return once there are members. Names that are not found are looked up again, as calls are made again.

        Raises:
            UnavailableError: No name can be looked up.
        """
        if not self._balancer.configured:
            self._name_retries.run(lambda: self._membership.wait_for_names(deadline), deadline)

    def close(self) -> None:
        """Run nothing any more."""
        self._is_closed = True
        self._name_retries.stop()
        self._retries.stop()

    def _try_members(self, search: Search[_R, _T]) -> _T:
        """Try every member that gets calls, once."""
        if self._is_closed:
            raise CallCancelledError("the connection is closed")
        search.deadline.check_cancelled()
        self._membership.wait_for_names(search.deadline)
        while True:
            attempt = RunningAttempt(CancelScope(), search.size_bytes, search.patience)
            preference = search.preference()
            member = self._balancer.begin(preference, attempt, search.vain)
            if member is None:
                failures = search.begin_round()
                raise self._conclude(failures, preference)
            try:
                return self._try_member(member, attempt, search)
            except DeconvdError as error:
                if not self._note_error(search, member, attempt, error):
                    raise
            finally:
                self._balancer.end(member, attempt)

    def _try_member(
        self, member: Member[_R], attempt: RunningAttempt, search: Search[_R, _T]
    ) -> _T:
        self._monitor.note_call()
        limit = search.deadline.with_limit(search.deadline.remaining_s())
        limit.timeout_s = search.deadline.timeout_s  # as messages name it
        limit.scope = attempt.scope
        with abort_on_cancel(search.deadline.scope, attempt.scope.cancel):
            returned = search.work(member.server, limit)
        queue_us = parse_ledger(self._ledgers.last_text).get("queue_us", 0)
        self._balancer.note_answer(member, queue_us / 1e6)
        return returned

    def _note_error(
        self,
        search: Search[_R, _T],
        member: Member[_R],
        attempt: RunningAttempt,
        error: DeconvdError,
    ) -> bool:
        failure = None if member.is_spare else self._judge(member, attempt, search, error)
        if failure is None:
            return False
        # without the frames, which refer to the caller's arrays
        search.failures.append(failure.with_traceback(None))
        search.vain.append(member)
        return True

    def _judge(
        self,
        member: Member[_R],
        attempt: RunningAttempt,
        search: Search[_R, _T],
        error: DeconvdError,
    ) -> DeconvdError | None:
        """Note an error of a member; return what to remember of it if the next is to be tried, else None."""
        search.deadline.check_cancelled()
        if self._is_closed:
            return None
        if attempt.is_given_up:
            search.patience = min(search.patience * _PATIENCE_FACTOR, _MAX_PATIENCE)
            return UnavailableError(f"the server at {member.identity.decode()} fell silent")
        match error:
            case ForkedChildError():
                return None  # it is no member's
            case UnavailableError() if error.was_reached:
                self._balancer.note_refusal(member, error.retry_after_s or 0.0)
                self._monitor.note_refusal(member)
            case UnavailableError():
                self._balancer.note_failure(member, error)
                self._monitor.note_failure()
            case CallCancelledError():
                self._balancer.note_refusal(member, _STOP_PAUSE_S)
                self._monitor.note_refusal(member)
            case DeadlineError():  # before the deadline: the server expects to be late
                if search.deadline.remaining_s() < _MIN_RETRY_S:
                    return None
                self._balancer.note_refusal(member, _STOP_PAUSE_S)
            case UnimplementedError():
                pass  # a newer one may be beside it
            case InternalError():
                self._balancer.note_fault(member, error)
                return None
            case _:
                return None
        return error

    def _conclude(
        self, failures: Sequence[DeconvdError], preference: Preference[_R]
    ) -> DeconvdError:
        """Return the error of a round in which no member has served a call."""
        unavailable = [error for error in failures if isinstance(error, UnavailableError)]
        if refusals := [error for error in unavailable if error.was_reached]:
            return min(refusals, key=lambda error: error.retry_after_s or 0.0)
        if unavailable or not failures:
            members = preference.holders[:1] if preference.is_bound else self._balancer.configured
            names: dict[str, list[str]] = {}  # by reason: lanes of one proxy say all the same
            for member in members:
                if member.error is not None:
                    names.setdefault(str(member.error), []).append(member.identity.decode())
            known = [f"{', '.join(those)}: {reason}" for reason, those in names.items()]
            reasons = known or [*dict.fromkeys(map(str, unavailable))]
            return UnavailableError(f"no server takes the call: {'; '.join(reasons)}")
        return failures[0]
