"""Decides which of several servers serves a call. It does no I/O, and knows servers by what is hashed of them alone."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from hashlib import blake2b
from itertools import chain
from typing import Final, Generic, TypeVar

from deconvd.errors import UnavailableError
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd_client.calls.cancel_scope import CancelScope
from deconvd_client.calls.deadline import Deadline
from deconvd_client.transports.backoff import Backoff

__all__ = ["Balancer", "Member", "MemberState", "Preference", "RunningAttempt"]

_S = TypeVar("_S")

_FIRST_PROBE_PAUSE_S: Final = 0.1
_MAX_PROBE_PAUSE_S: Final = 2.0
"""How long a server that is out is left alone, at first and at most. Then it is probed."""

_OUTLIER_PAUSE_S: Final = 2.0
_MAX_OUTLIER_PAUSE_S: Final = 60.0
"""The same for a server that answers, but with errors of its own."""

_MAX_FAULTS_COUNT: Final = 3
"""How many calls in succession may fail by a fault of a server before it is an outlier."""

_CALL_COST_S: Final = 1e-3
_COST_S_PER_BYTE: Final = 1e-9
"""What a running call is assumed to take: only the ratios between servers matter."""

_QUEUE_HALF_LIFE_S: Final = 1.0
"""How fast it is forgotten how long calls have queued at a server."""

_ORDERS_COUNT: Final = 1024
"""For how many keys the order of the members is remembered: it takes microseconds for each member to find it."""

_SPILL_FACTOR: Final = 2.0
_SPILL_S: Final = 0.05
"""A call leaves the server that has its W if it would wait so much longer there than at the next: less costs more."""


class MemberState(Enum):
    """Whether a server gets calls.

    SERVING --it fails, drains, or is an outlier--> OUT --a probe finds it serving--> SERVING
    SERVING or OUT --it is no longer configured--> RETIRED --it is configured again--> SERVING
    """

    SERVING = "serving"

    OUT = "out"
    """It gets no new calls, and is probed."""

    RETIRED = "retired"
    """It gets no calls, except those of residents that only it has."""


@dataclass(eq=False, slots=True)
class RunningAttempt:
    """A call that a server has been given.

    Attributes:
        scope: Ends it.
        size_bytes: Size of its tensors.
        patience: How many times longer than usual its server may be silent: more after each vain change of servers.
        is_given_up: Whether its server was found to be silent.
    """

    scope: CancelScope
    size_bytes: int
    patience: float
    began_s: float = field(default_factory=time.monotonic)
    is_given_up: bool = False


@dataclass(eq=False, slots=True)
class Member(Generic[_S]):
    """One of the servers. Its balancer changes it, with a lock held; everybody may read it.

    Attributes:
        identity: What rendezvous hashing hashes. All clients must use the same for a server.
        server: The server itself, which only the owner of the balancer looks into.
        is_spare: Whether it gets only calls that no other takes. It is never OUT: it waits for a server by itself.
        quick_calls: The calls that run there without an attempt, by their deadlines. Their owner adds and removes them.
        attempts: The calls that it has been given, and has not answered.
        error: Why it is OUT.
        sign_s: When it last gave a sign of life, on the monotonic clock.
        probe_s: When it was last probed.
    """

    identity: bytes
    server: _S
    is_spare: bool = False
    state: MemberState = MemberState.SERVING
    quick_calls: set[Deadline] = field(default_factory=set)
    attempts: set[RunningAttempt] = field(default_factory=set)
    error: UnavailableError | None = None
    sign_s: float = -math.inf
    probe_s: float = -math.inf
    _busy_until_s: float = -math.inf
    _faults_count: int = 0
    _queue_s: float = 0.0
    _queue_time_s: float = -math.inf  # when that was
    _running_s: float = 0.0  # what `attempts` are assumed to take
    _pause: Backoff = field(
        default_factory=lambda: Backoff(_FIRST_PROBE_PAUSE_S, _MAX_PROBE_PAUSE_S)
    )
    _outlier_pause: Backoff = field(
        default_factory=lambda: Backoff(_OUTLIER_PAUSE_S, _MAX_OUTLIER_PAUSE_S)
    )

    @property
    def next_probe_s(self) -> float:
        """In how many seconds it has been left alone for long enough."""
        return max(self._pause.remaining_s, self._outlier_pause.remaining_s)

    @property
    def running_count(self) -> int:
        """How many calls from here run there."""
        return len(self.quick_calls) + len(self.attempts)

    @property
    def expected_wait_s(self) -> float:
        """How long a call would have to wait there, by what this client knows."""
        age_s = time.monotonic() - self._queue_time_s
        running_s = self._running_s + len(self.quick_calls) * _CALL_COST_S
        return running_s + self._queue_s * math.exp2(-age_s / _QUEUE_HALF_LIFE_S)

    @property
    def is_pausing(self) -> bool:
        """Whether it has asked for a pause that is not over."""
        return self._busy_until_s > time.monotonic()

    def rank_for(self, key: bytes) -> bytes:
        """Return its rank for a key: the member with the largest has what belongs to the key."""
        return blake2b(key, key=blake2b(self.identity).digest(), digest_size=8).digest()


@dataclass(frozen=True, slots=True)
class Preference(Generic[_S]):
    """Where a call should be served.

    Attributes:
        key: Calls with the same key go to the same member, and all clients agree which that is. Empty if it does not
            matter.
        turn: Which of the members in the order for the key: 0 for the first. The parts of one call have different ones.
        holders: Members that are better than others, the best first: they have operands of the call.
        is_bound: Whether no other than the first holder can serve it.
    """

    key: bytes = b""
    turn: int = 0
    holders: tuple[Member[_S], ...] = ()
    is_bound: bool = False


class Balancer(Generic[_S]):
    """Knows how several servers fare, and chooses one for each call. Thread-safe.

    A call goes to

    1. a member that has its residents;
    2. by rendezvous hashing, the member that has its key, unless that is overloaded;
    3. the member where it would wait least.

    Only members that are SERVING are chosen, and those that have asked for a pause come last.
    """

    def __init__(self) -> None:
        self._lock = new_lock()
        self._members: dict[bytes, Member[_S]] = {}
        self._orders: dict[bytes, list[Member[_S]]] = {}  # of those that are configured, by key
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Forget the calls of the parent, which end in the parent."""
        for member in self._members.values():
            member.attempts.clear()
            member._running_s = 0.0
            member.quick_calls.clear()

    @property
    def members(self) -> tuple[Member[_S], ...]:
        """All members, also those that are OUT or RETIRED, in the order in which they were added."""
        with self._lock:
            return tuple(self._members.values())

    @property
    def configured(self) -> tuple[Member[_S], ...]:
        """All members that are not RETIRED, in the same order."""
        return tuple(m for m in self.members if m.state is not MemberState.RETIRED)

    def has_serving(self) -> bool:
        """Return whether a member that is no spare gets calls."""
        return any(m.state is MemberState.SERVING and not m.is_spare for m in self.members)

    def find(self, identity: bytes) -> Member[_S] | None:
        """Return the member with an identity, also a RETIRED one; None if there is none."""
        with self._lock:
            return self._members.get(identity)

    def add(self, member: Member[_S]) -> None:
        """Add a member, or take one back that is RETIRED."""
        with self._lock:
            self._members[member.identity] = member
            self._orders.clear()
            if member.state is MemberState.RETIRED:
                member.state = MemberState.SERVING

    def retire(self, member: Member[_S]) -> None:
        """Give a member no calls from now on, except those of residents that only it has."""
        with self._lock:
            member.state = MemberState.RETIRED
            self._orders.clear()

    def remove(self, member: Member[_S]) -> None:
        """Forget a member."""
        with self._lock:
            self._members.pop(member.identity, None)
            self._orders.clear()

    def begin(
        self,
        preference: Preference[_S],
        attempt: RunningAttempt,
        vain: Collection[Member[_S]],
    ) -> Member[_S] | None:
        """Choose the member for an attempt, and count it there; return None if there is none.

        Args:
            vain: Those that have been tried in vain.
        """
        with self._lock:
            member = self._choose(preference, vain)
            if member is not None:
                member.attempts.add(attempt)
                member._running_s += _cost_s(attempt)
            return member

    def end(self, member: Member[_S], attempt: RunningAttempt) -> None:
        """Note that an attempt has ended, in whichever way."""
        with self._lock:
            if attempt in member.attempts:  # it is not after a fork
                member.attempts.remove(attempt)
                member._running_s = max(member._running_s - _cost_s(attempt), 0.0)

    def note_answer(self, member: Member[_S], queue_s: float) -> None:
        """Note that a member has served a call, which waited for its turn for `queue_s`."""
        now_s = time.monotonic()
        member.sign_s = now_s
        member._queue_s, member._queue_time_s = queue_s, now_s
        if member._faults_count:
            member._faults_count = 0
            member._outlier_pause.note_success()

    def note_refusal(self, member: Member[_S], pause_s: float) -> None:
        """Note that a member takes no calls for `pause_s`: it is full, starts or drains."""
        member.sign_s = time.monotonic()
        member._busy_until_s = member.sign_s + pause_s

    def note_failure(self, member: Member[_S], error: UnavailableError) -> None:
        """Take a member out: it cannot be reached, is silent, or drains."""
        with self._lock:
            if member.is_spare:
                return
            if member.state is MemberState.SERVING:
                member.state, member.error = MemberState.OUT, error
            member._pause.note_failure()

    def note_fault(self, member: Member[_S], error: Exception) -> None:
        """Note a fault of a member; take it out if it has had several, unless half of the members are out."""
        member.sign_s = time.monotonic()
        with self._lock:
            member._faults_count += 1
            if member._faults_count < _MAX_FAULTS_COUNT or member.state is not MemberState.SERVING:
                return
            serving_count = len(self._serving)
            if serving_count - 1 >= len(self._members) / 2:
                member.state = MemberState.OUT
                member.error = UnavailableError(
                    f"it is left alone after faults of its own: {error}"
                )
                member._faults_count = _MAX_FAULTS_COUNT - 1  # one more takes it out again
                member._outlier_pause.note_failure()

    def note_health(self, member: Member[_S]) -> None:
        """Note that a probe has found a member serving."""
        with self._lock:
            member.sign_s = time.monotonic()
            if member.state is MemberState.OUT:
                member.state, member.error = MemberState.SERVING, None
            member._pause.note_success()

    def note_silence(self, member: Member[_S], error: UnavailableError) -> list[RunningAttempt]:
        """Take out a member that gives no sign of life, and return the attempts to give up there.

        The last one that serves is not taken out: its calls have nowhere else to go, and it may only be slow.
        """
        with self._lock:
            if member.state is MemberState.SERVING:
                if member.is_spare or all(other is member for other in self._serving):
                    return []
                member.state, member.error = MemberState.OUT, error
            member._pause.note_failure()
            attempts = [*member.attempts] if self._serving else []
            for attempt in attempts:
                attempt.is_given_up = True
            return attempts

    @property
    def _serving(self) -> list[Member[_S]]:
        return [m for m in self._members.values() if m.state is MemberState.SERVING]

    def _choose(
        self, preference: Preference[_S], vain: Collection[Member[_S]]
    ) -> Member[_S] | None:
        holders = [holder for holder in preference.holders if holder not in vain]
        if preference.is_bound:
            first = holders[0] if holders and holders[0] is preference.holders[0] else None
            return None if first is None or first.state is MemberState.OUT else first
        for holder in holders:
            if holder.state is MemberState.SERVING:
                return holder
        candidates = [member for member in self._serving if member not in vain]
        candidates = [member for member in candidates if not member.is_spare] or candidates
        now_s = time.monotonic()
        ready = [member for member in candidates if member._busy_until_s <= now_s]
        if not ready:
            return min(candidates, key=lambda member: member._busy_until_s, default=None)
        return self._choose_by_key(preference, ready) or min(
            ready,
            key=lambda member: (member.expected_wait_s, random.random()),  # noqa: S311 - no secret
        )

    def _choose_by_key(
        self, preference: Preference[_S], ready: Collection[Member[_S]]
    ) -> Member[_S] | None:
        """Return the member that has the key; None if there is no key, or that member has too much to do."""
        if not preference.key:
            return None
        order = self._order(preference.key)
        turn = preference.turn % len(order)
        usable = (member for member in chain(order[turn:], order[:turn]) if member in ready)
        first, second = next(usable), next(usable, None)
        if preference.turn or second is None:
            return first
        is_overloaded = first.expected_wait_s > _SPILL_FACTOR * second.expected_wait_s + _SPILL_S
        return None if is_overloaded else first

    def _order(self, key: bytes) -> list[Member[_S]]:
        """Return all members that are configured in the order for a key: nobody's place depends on who is alive."""
        order = self._orders.get(key)
        if order is None:
            configured = [m for m in self._members.values() if m.state is not MemberState.RETIRED]
            order = sorted(configured, key=lambda member: member.rank_for(key), reverse=True)
            if len(self._orders) >= _ORDERS_COUNT:
                self._orders.clear()
            self._orders[key] = order
        return order


def _cost_s(attempt: RunningAttempt) -> float:
    return _CALL_COST_S + attempt.size_bytes * _COST_S_PER_BYTE
