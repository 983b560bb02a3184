"""Counts of a server's calls: plain integers, for GetServerInfo and for metrics whenever they are asked for.

Locks: one lock, which is taken alone, once a call, and held for a microsecond; by those who ask, while integers are
copied.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import add
from typing import Final, TypeAlias

from deconvd.wire.server_counts import BUCKETS_COUNT, MethodCounts, StageTimes
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage

__all__ = ["OTHER_TENANT", "CallCounts"]

_MethodCopy: TypeAlias = tuple[tuple[str, str], dict[str, int], int, int]
"""Of one method by one transport: calls that have ended by status, bytes received and bytes sent."""

_INTEGER_BITS: Final = 64

OTHER_TENANT: Final = "other"
"""The name of all tenants together that have none of their own in metrics."""

_TENANTS_COUNT: Final = 512
"""How many identities are counted apart for as long as the server runs, each in 5 KB: those that call first."""

_PASSING_COUNT: Final = 128
"""How many further ones are told their own counts. Then the one that has not called for longest begins anew."""

_QUEUE: Final = (
    Stage.QUEUE
)  # looking a member up in its class takes longer than the rest of the expression
_SERVER: Final = Stage.SERVER


class _MethodTally:
    """What the calls of one method by one transport that have ended add up to."""

    __slots__ = ("ended", "received_bytes", "sent_bytes")

    def __init__(self) -> None:
        self.ended: dict[str, int] = {}  # by status
        self.received_bytes = 0
        self.sent_bytes = 0


class _StageTally:
    """What the times of one stage add up to."""

    __slots__ = ("counts", "total_us")

    def __init__(self) -> None:
        self.total_us = 0
        self.counts = [0] * _INTEGER_BITS  # by the number of bits of the time

    def times(self, stage: Stage) -> StageTimes:
        """Return the sums as they are now."""
        last = BUCKETS_COUNT - 1
        counts = [*self.counts[:last], sum(self.counts[last:])]
        while counts and not counts[-1]:
            counts.pop()
        return StageTimes(stage.removesuffix("_us"), sum(counts), self.total_us, tuple(counts))

    def include(self, total_us: int, counts: Sequence[int]) -> None:
        """Add the times of other calls."""
        self.total_us += total_us
        self.counts = list(map(add, self.counts, counts))


class _Tallies:
    """What the calls of one identity, or of several, that have ended add up to."""

    __slots__ = ("by_method", "by_stage")

    def __init__(self) -> None:
        self.by_method: dict[tuple[str, str], _MethodTally] = {}  # and transport
        self.by_stage: dict[Stage, _StageTally] = {}

    def add(
        self,
        key: tuple[str, str],
        call: CallContext,
        status: str,
        times_us: Mapping[Stage, int] | None,
    ) -> None:
        """Count a call that has ended; the times of its stages, too, if they are given."""
        tally = self.by_method.get(key)
        if tally is None:
            tally = self.by_method[key] = _MethodTally()
        ended = tally.ended
        ended[status] = ended.get(status, 0) + 1
        tally.received_bytes += call.received_bytes
        tally.sent_bytes += call.sent_bytes
        if times_us is None:
            return
        for stage, time_us in times_us.items():
            times = self.by_stage.get(stage)
            if times is None:
                times = self.by_stage[stage] = _StageTally()
            times.total_us += time_us
            times.counts[time_us.bit_length()] += 1

    def copy_methods(self) -> list[_MethodCopy]:
        """Return the sums by method, in the least time: the lock is held meanwhile, and calls wait for it."""
        return [
            (key, tally.ended.copy(), tally.received_bytes, tally.sent_bytes)
            for key, tally in self.by_method.items()
        ]

    def copy_stages(self) -> list[tuple[Stage, int, list[int]]]:
        """Return the sums of the times and the histogram of each stage, likewise."""
        return [
            (stage, tally.total_us, tally.counts.copy()) for stage, tally in self.by_stage.items()
        ]


class CallCounts:
    """Counts calls by method, transport and status, their bytes, and the times of their stages. Thread-safe.

    It is an observer of calls (`deconvd_server.transports.observers`). The stages of a call count if it has waited for
    a device or used one. The calls of each identity are counted apart: what others do is no business of an identity.
    All calls are the sum.
    """

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._lock = threading.Lock()
        self._by_tenant = {"": _Tallies()}  # calls without an identity, and the first identities
        self._others = _Tallies()
        self._passing: dict[
            str, _Tallies
        ] = {}  # of the others; the one that has called last at the end
        self._running: dict[CallContext, str] = {}  # with the method of each

    @property
    def uptime_us(self) -> int:
        """For how long this has counted."""
        return round((time.monotonic() - self._began_s) * 1e6)

    def begin(self, method: str, call: CallContext) -> None:
        """Count a call as running."""
        self._running[call] = method  # one atomic step of the interpreter

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """Count a call that has ended."""
        key = (method, call.transport)
        times_us, ledger_us = None, call.ledger.times_us
        if len(ledger_us) > 1 or ledger_us[_QUEUE]:
            times_us = ledger_us.copy()  # a worker that its caller does not wait for may add to it
            times_us[_SERVER] = int((time.perf_counter() - call.ledger.began_s) * 1e6)
        with self._lock:
            self._running.pop(call, None)
            tallies = self._by_tenant.get(call.identity) or self._make_tallies(call.identity)
            tallies.add(key, call, status, times_us)
            if tallies is self._others:
                self._passing_tallies(call.identity).add(key, call, status, times_us)

    def methods(self, identity: str = "") -> Sequence[MethodCounts]:
        """Return the counts of each method by each transport. Calls that run are included.

        Args:
            identity: The one whose calls are wanted; empty for all calls.
        """
        with self._lock:
            running = _RunningCounts()
            for call, method in self._running.copy().items():
                if not identity or call.identity == identity:
                    running.add(method, call)
            copies = [each.copy_methods() for each in self._visible_tallies(identity)]
        return _method_counts(copies, running)

    def methods_by_tenant(self) -> Mapping[str, Sequence[MethodCounts]]:
        """Return the counts of all calls by tenant, each as `methods` does.

        A tenant is an identity, or empty for calls without one. At most `_TENANTS_COUNT` have names of their own, and
        keep them. All others are `OTHER_TENANT`.
        """
        running: defaultdict[str, _RunningCounts] = defaultdict(_RunningCounts)
        with self._lock:
            for call, method in self._running.copy().items():
                # a tenant whose first call runs gets its name now: what it has sent must not change names later
                tallies = self._by_tenant.get(call.identity) or self._make_tallies(call.identity)
                tenant = OTHER_TENANT if tallies is self._others else call.identity
                running[tenant].add(method, call)
            copies = {tenant: each.copy_methods() for tenant, each in self._by_tenant.items()}
            copies[OTHER_TENANT] = self._others.copy_methods()
        return {tenant: _method_counts([copies[tenant]], running[tenant]) for tenant in copies}

    def stages(self, identity: str = "") -> Sequence[StageTimes]:
        """Return the times of each stage that calls have had: those of an identity, or all calls, as `methods`."""
        with self._lock:
            copies = [each.copy_stages() for each in self._visible_tallies(identity)]
        sums: dict[Stage, _StageTally] = {}
        for stage, total_us, counts in chain.from_iterable(copies):
            sums.setdefault(stage, _StageTally()).include(total_us, counts)
        return [sums[stage].times(stage) for stage in Stage if stage in sums]

    def _visible_tallies(self, identity: str) -> Iterable[_Tallies]:
        """Return what an identity may see. The caller holds the lock."""
        if not identity:
            return [*self._by_tenant.values(), self._others]
        own = self._by_tenant.get(identity) or self._passing.get(identity)
        return () if own is None else (own,)

    def _make_tallies(self, identity: str) -> _Tallies:
        """Return the tallies for an identity that has none: those of all others if there are too many already.

        The caller holds the lock.
        """
        if identity == OTHER_TENANT or len(self._by_tenant) > _TENANTS_COUNT:
            return self._others
        tallies = self._by_tenant[identity] = _Tallies()
        return tallies

    def _passing_tallies(self, identity: str) -> _Tallies:
        """Return the own tallies of one of the others, which may be new. The caller holds the lock."""
        tallies = self._passing.pop(identity, None)
        if tallies is None:
            tallies = _Tallies()
            if len(self._passing) == _PASSING_COUNT:
                del self._passing[next(iter(self._passing))]
        self._passing[identity] = tallies
        return tallies


class _RunningCounts:
    """What calls that run add up to, by method and transport."""

    __slots__ = ("calls", "received_bytes", "sent_bytes")

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.received_bytes: Counter[tuple[str, str]] = Counter()
        self.sent_bytes: Counter[tuple[str, str]] = Counter()

    def add(self, method: str, call: CallContext) -> None:
        key = (method, call.transport)
        self.calls[key] += 1
        self.received_bytes[key] += call.received_bytes
        self.sent_bytes[key] += call.sent_bytes


def _method_counts(
    copies: Iterable[Iterable[_MethodCopy]], running: _RunningCounts
) -> list[MethodCounts]:
    """Return the sums of what tenants' calls and running calls add up to, sorted by method and transport."""
    ended: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    received, sent = running.received_bytes.copy(), running.sent_bytes.copy()
    for key, by_status, received_bytes, sent_bytes in chain.from_iterable(copies):
        ended[key].update(by_status)
        received[key] += received_bytes
        sent[key] += sent_bytes
    return [
        MethodCounts(
            method=key[0],
            transport=key[1],
            ended=dict(sorted(ended[key].items())),
            running_count=running.calls[key],
            received_bytes=received[key],
            sent_bytes=sent[key],
        )
        for key in sorted(ended.keys() | running.calls.keys())
    ]
