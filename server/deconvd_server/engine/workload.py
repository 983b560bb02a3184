"""The work that a device has taken on: how long its calls take alone, whose they are, and how long a further one waits.

Calls of one kind have the same footprint. So the footprint is the key under which a call's time is remembered.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from deconvd_server.engine.decaying_sum import DecayingSum

__all__ = ["LEAST_WORK_S", "WaitEstimate", "Workload"]

LEAST_WORK_S: Final = 1e-3
"""Calls that take less count as no work: thousands of them end in a second."""

_KINDS_COUNT: Final = 1024
"""How many kinds of calls are remembered. Then the oldest one is forgotten."""

_PRESENT_S: Final = 10.0
"""For how long after its last call a peer is expected to call again."""

_USE_HALVING_S: Final = 1.0
"""In this time the memory of what a peer has used halves."""

_LIGHT_PART: Final = 0.8
"""A peer is light beside a flood if it uses less than this part of what each peer would have of equal parts."""

_OFFERED_HALVING_S: Final = 0.35
"""In this time the memory of what was offered to the device halves: it is that of half a second."""

_REFUSED_HALVING_S: Final = 0.7
"""The same of what was refused: of a second."""

_OVERLOAD_PART: Final = 0.8
"""A device to which more than this part of what it can do is offered has too much: at random times, half a second of
that is often more than it can do."""

_STARVED_PART: Final = 0.25
"""A peer is light, too, if it has used less than this part of one call: it has waited for two seconds."""

_FLOOD_PART: Final = 0.5
"""A peer floods the device if it uses more than this part of what all have used."""

_SMOOTHING: Final = 1 / 16
"""The weight of the newest call in an average."""

_NOISE: Final = 1.25
"""By so much a call may be slower than its kind without any change in the device."""


@dataclass(slots=True, eq=False)
class _PeerWork:
    """The work of one peer.

    Attributes:
        costs_s: Of its calls that wait or run.
        last_cost_s: Of its last call.
        used_s: What it has used lately.
        seen_s: When its last call came.
    """

    costs_s: list[float] = field(default_factory=list)
    last_cost_s: float = 0.0
    used_s: DecayingSum = field(default_factory=lambda: DecayingSum(_USE_HALVING_S))
    seen_s: float = 0.0


_NO_WORK: Final = _PeerWork()


class WaitEstimate(NamedTuple):
    """How long a call would wait for others, and whether so much comes that a queue would stay full."""

    delay_s: float
    is_overloaded: bool


class Workload:
    """What the calls that wait or run cost a device, in seconds that it takes for each alone. Not thread-safe.

    Args:
        places_count: How many calls run at once.

    Attributes:
        alone_s: How long calls of a kind take alone, by their footprint.
        mean_s: How long calls take alone on average, for kinds that are not known yet.
        parallelism: How many calls run at once without slowing each other down, as measured: 1 if each call uses all of
            the device.
        total_s: The cost of all calls that wait or run.
    """

    def __init__(self, places_count: int) -> None:
        self._places_count = places_count
        self.alone_s: dict[int, float] = {}
        self.mean_s = 0.0
        self.parallelism = 1.0
        self.total_s = 0.0
        self._calls_count = 0
        self._offered_s = DecayingSum(_OFFERED_HALVING_S)
        self._refused_s = DecayingSum(_REFUSED_HALVING_S)
        self._peers: dict[str, _PeerWork] = {}

    def add(self, peer: str, cost_s: float) -> None:
        """Count a call that waits or runs from now on."""
        now_s = time.monotonic()
        work = self._peers.get(peer)
        if work is None:
            self._forget_absent(now_s)
            work = self._peers[peer] = _PeerWork()
        work.used_s.add(cost_s, now_s)
        self._offered_s.add(cost_s, now_s)
        work.seen_s, work.last_cost_s = now_s, cost_s
        work.costs_s.append(cost_s)
        self.total_s += cost_s
        self._calls_count += 1

    def remove(self, peer: str, cost_s: float) -> None:
        """Stop counting a call."""
        self._peers[peer].costs_s.remove(cost_s)
        self._calls_count -= 1
        self.total_s = self.total_s - cost_s if self._calls_count else 0.0

    def refuse(self, cost_s: float) -> float:
        """Note that a call is refused; return how long all that was refused in about a second would take."""
        now_s = time.monotonic()
        self._offered_s.add(cost_s, now_s)
        self._refused_s.add(cost_s, now_s)
        return self._refused_s.total(now_s) / self.parallelism

    def estimate_wait(self, peer: str, cost_s: float) -> WaitEstimate:
        """Return how long a further call would wait for others, if peers had equal parts of the device.

        A longer call delays it by its own length at most, since calls take turns. Where other peers have called lately,
        a peer's further calls also leave room for one of theirs. A light peer is judged as if it were alone: so neither
        a flood nor many others have its calls refused again and again.
        """
        now_s = time.monotonic()
        present = {
            key: work
            for key, work in self._peers.items()
            if work.costs_s or now_s - work.seen_s < _PRESENT_S
        }
        own = present.pop(peer, _NO_WORK)
        own_s = cost_s + _shared_s(own, cost_s)
        delay_s = own_s - cost_s
        is_overloaded = False
        if not _is_light(own, cost_s, present.values(), now_s):
            for other in present.values():
                delay_s += min(_shared_s(other, cost_s), own_s)
            if own_s > cost_s:
                absent_s = [work.last_cost_s for work in present.values() if not work.costs_s]
                delay_s += min(max(absent_s, default=0.0), cost_s)
            # two calls as long as this one say nothing yet
            capacity_s = self.parallelism * self._offered_s.window_s
            most_s = _OVERLOAD_PART * capacity_s + 2 * cost_s
            is_overloaded = self._offered_s.total(now_s) > most_s
        return WaitEstimate(delay_s / self.parallelism, is_overloaded)

    def note(self, footprint_bytes: int, elapsed_s: float, share_s: float) -> None:
        """Learn from a call that has ended.

        Args:
            elapsed_s: For how long it had a place.
            share_s: Its part of that time: see `PlaceClock.share_s`.

        If calls slow each other down as much as they can, a call takes its share of the time alone; if they do not at
        all, it takes all of it. So the time that it takes alone is between the two.
        """
        known_s = self.alone_s.pop(footprint_bytes, None)
        if elapsed_s < LEAST_WORK_S:
            alone_s = 0.0
        elif known_s is None:
            alone_s = share_s
        else:
            slower_s = max(share_s / _NOISE - known_s, 0.0)
            alone_s = min(known_s + _SMOOTHING * slower_s, elapsed_s)
        if len(self.alone_s) >= _KINDS_COUNT:
            del self.alone_s[next(iter(self.alone_s))]
        self.alone_s[footprint_bytes] = alone_s
        if not alone_s:
            return
        self.mean_s += (alone_s - self.mean_s) * _SMOOTHING if self.mean_s else alone_s
        if elapsed_s > 1.5 * share_s:  # it was not alone, and tells how much that mattered
            parallelism = min(max(alone_s / share_s, 1.0), self._places_count)
            self.parallelism += (parallelism - self.parallelism) * _SMOOTHING

    def _forget_absent(self, now_s: float) -> None:
        """Forget peers that have not called for long, so that no more are remembered than call."""
        absent = [
            peer
            for peer, work in self._peers.items()
            if not work.costs_s and now_s - work.seen_s >= _PRESENT_S
        ]
        for peer in absent:
            del self._peers[peer]


def _shared_s(work: _PeerWork, cost_s: float) -> float:
    """Return by how much a peer's calls delay one that takes `cost_s`."""
    return sum(min(other_s, cost_s) for other_s in work.costs_s)


def _is_light(own: _PeerWork, cost_s: float, others: Collection[_PeerWork], now_s: float) -> bool:
    """Return whether a peer has used next to nothing lately, or little of a device that another one floods."""
    own_s = own.used_s.total(now_s)
    if own_s < _STARVED_PART * cost_s:
        return True
    others_s = [work.used_s.total(now_s) for work in others]
    used_s = own_s + sum(others_s)
    is_flooded = max(others_s, default=0.0) > _FLOOD_PART * used_s
    return is_flooded and own_s * (1 + len(others_s)) < _LIGHT_PART * used_s
