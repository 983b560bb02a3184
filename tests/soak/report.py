"""What came of a soak: what was violated, and a short report."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.soak.clients import Client, Hostile
from tests.soak.health import Check
from tests.soak.honest import BARE_WAYS, TOLD_BY_GRPC, Failure, Outcome
from tests.soak.places import Interval
from tests.soak.supervisor import Drain, Record

__all__ = ["Results"]

_HEALTH_S = 3.0
"""A second, and what a busy machine may add to it."""

_CALL_S = 10.0
"""How long an honest call may take of the time that the server is there.

They are all small, and hostile peers leave them places in the queue. But a stream may wait for five seconds for streams
of hostile peers, and for two more for one that came before. The rest is for a busy machine.
"""

_SETTLING_S = 3.0
"""How long after the server is there again clients may still find it away."""

_UNDER_WAY_S = 0.5
"""How long before SIGTERM a call must have begun to be accepted: before that it may be on its way."""

_SHOWN_COUNT = 4
_FAULTS = "unforeseen", "Unexpected [", "Exception in thread", "can't start new thread"
"""What is in the server's log, or gRPC's part of it, where something was not thought of."""

_MIB = 1 << 20


@dataclass(frozen=True)
class Results:
    """What a soak has found out.

    Attributes:
        failed_clients: What clients failed of their own, or did not end.
        attacks_count: How often each kind attacked.
    """

    outcomes: Sequence[Outcome]
    checks: Sequence[Check]
    record: Record
    failed_clients: Sequence[str]
    attacks_count: Counter[str]
    logs: Sequence[Path]

    @classmethod
    def of(
        cls,
        directory: Path,
        record: Record,
        honest: Sequence[Client],
        health: Client,
        hostile: Sequence[Hostile],
        faults: Sequence[str],
    ) -> Results:
        """Return what clients have written in a directory, once all have ended."""
        attacks: Counter[str] = Counter()
        for client in hostile:
            attacks[client.kind] += client.attacks_count
        ended = [client for client in honest if client.process.returncode == 0]
        return cls(
            outcomes=[Outcome.of(client.report) for client in ended],
            checks=[Check.of(*fields) for fields in json.loads(health.report or "[]")],
            record=record,
            failed_clients=[fault for fault in faults if fault],
            attacks_count=attacks,
            logs=sorted(directory.glob("server-*/server.log")),
        )

    def violations(self) -> list[str]:
        """Return what must not be."""
        return [*self.record.faults, *self.failed_clients, *self._violations()]

    def to_text(self) -> str:
        """Return the report."""
        s = self.record
        late = sorted((check for check in self.checks if self._counts(check.when)), key=_latency)
        misses = sum(check.text != "SERVING" for check in late)
        codes = Counter(f"{drain.code} x" for drain in s.drains)
        under_way = [self._under_way(drain) for drain in s.drains]
        lines = [f"{'way':<18}{'calls':>7}{'wrong':>7}{'errors':>8}{'slowest':>9}"]
        for o in self.outcomes:
            errors = sum(failure.is_last for failure in o.failures)
            lines.append(
                f"{o.way:<18}{len(o.answered):>7}{len(o.wrong):>7}{errors:>8}{_length_s(o.slowest):>8.1f}s"
            )
        kinds = Counter(f"{f.kind} in {o.way}" for o in self.outcomes for f in o.failures)
        attacks = ", ".join(f"{name} {n}" for name, n in sorted(self.attacks_count.items()))
        lines += [
            f"errors by kind: {_listed(kinds)}",
            f"health: {len(late)} checks, worst {_latency(late[-1]) if late else 0:.2f} s, missed {misses}",
            f"memory: {s.memory_bytes // _MIB} MiB in the process, {s.group_bytes // _MIB} in its cgroup, of "
            f"{s.bound_bytes // _MIB}; {s.threads_count} threads, {s.descriptors_count} descriptors",
            f"server: started {s.starts_count} times, killed {s.kills_count}, drained {len(s.drains)}, with exit "
            f"codes {_listed(codes)}, the slowest in {max((d.took_s for d in s.drains), default=0):.1f} s",
            f"calls under way at SIGTERM: {sum(map(len, under_way))}, lost {sum(map(sum, under_way))}",
            f"attacks: {attacks or 'none'}",
        ]
        return "\n".join(lines)

    def _violations(self) -> Iterator[str]:
        for o in self.outcomes:
            yield from _few(f"{o.way}: a wrong result", o.wrong)
            errors = [f for f in o.failures if f.is_last and self._must_end(f.when)]
            yield from _few(f"{o.way}: an error", [f"{f.kind}: {f.text}" for f in errors])
            if self._presence_s(o.slowest) > _CALL_S:
                yield f"{o.way}: a call took {_length_s(o.slowest):.1f} s, until {_time_of_day(o.slowest[1])}"
            if not o.answered:
                yield f"{o.way}: not one call was answered"
        checks = [check for check in self.checks if self._counts(check.when)]
        missed = [check.text for check in checks if check.text != "SERVING"]
        yield from _few("health was missed", missed)
        late = [f"in {_latency(c):.1f} s" for c in checks if _latency(c) > _HEALTH_S]
        yield from _few("health was late", late)
        for drain in self.record.drains:
            lost = sum(self._under_way(drain))
            if lost:
                yield f"{lost} calls under way at a SIGTERM were neither answered nor told"
        bound_bytes = self.record.bound_bytes
        for name, size_bytes in (
            ("process", self.record.memory_bytes),
            ("cgroup", self.record.group_bytes),
        ):
            if size_bytes > bound_bytes:
                yield f"memory: {size_bytes // _MIB} MiB in the {name}, of {bound_bytes // _MIB}"
        for log in self.logs:
            text = log.read_text(errors="replace")
            for mark in _FAULTS:
                if mark in text:
                    yield f"{log}: {mark!r}"

    def _counts(self, when: Interval) -> bool:
        """Return whether the server was there all the time."""
        return self._presence_s(when) >= _length_s(when)

    def _must_end(self, when: Interval) -> bool:
        """Return whether the server was there all the time, or for long enough."""
        return self._counts(when) or self._presence_s(when) > _CALL_S

    def _presence_s(self, when: Interval) -> float:
        """Return for how long of it the server was there, and had been for a moment."""
        away_s = (
            min(when[1], end + _SETTLING_S) - max(when[0], begin)
            for begin, end in self.record.absences
        )
        return _length_s(when) - sum(max(one_s, 0.0) for one_s in away_s)

    def _under_way(self, drain: Drain) -> list[bool]:
        """Return of each call of bare clients that was under way at a drain's begin whether it was lost."""
        at_s = drain.when[0]
        begun_s = at_s - _UNDER_WAY_S
        bare = [o for o in self.outcomes if o.way in BARE_WAYS]
        tries = [(when, True) for o in bare for when in o.answered]
        tries += [(f.when, _is_outcome_known(f, drain)) for o in bare for f in o.failures]
        return [not was_told for (begin, end), was_told in tries if begin < begun_s and end > at_s]


def _is_outcome_known(failure: Failure, drain: Drain) -> bool:
    """Return whether a call was told what became of it: what a drain cuts short in the end gRPC may tell."""
    is_cut = failure.text == TOLD_BY_GRPC and failure.when[1] >= drain.cut_s
    return failure.was_told or is_cut


def _length_s(interval: Interval) -> float:
    return interval[1] - interval[0]


def _time_of_day(at_s: float) -> str:
    """Return when something was on the monotonic clock, as logs have it."""
    return time.strftime("%H:%M:%S", time.localtime(time.time() - time.monotonic() + at_s))


def _latency(check: Check) -> float:
    return _length_s(check.when)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "none"


def _few(what: str, texts: Sequence[str]) -> Iterator[str]:
    """Yield how often something was, and the first few."""
    if texts:
        yield f"{what}, {len(texts)} times: " + "; ".join(t[:300] for t in texts[:_SHOWN_COUNT])
