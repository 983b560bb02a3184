"""The work of a device: how long a further call would wait, as learned from those before, on a clock of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from deconvd_server.call.context import CallContext
from deconvd_server.engine import place_clock, workload
from deconvd_server.engine.decaying_sum import DecayingSum
from deconvd_server.engine.fair_queue import FairQueue, Ticket
from deconvd_server.engine.place_clock import PlaceClock, PlaceSpan
from deconvd_server.engine.queue_limits import WaitLimit
from deconvd_server.engine.workload import Workload
from tests.clocks import StandingClock, stop_clock

KIND = 4096
"""The footprint of all calls here."""

ALONE_S = 0.02


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StandingClock:
    return stop_clock(monkeypatch, workload, place_clock)


def known(places_count: int = 2, alone_s: float = ALONE_S) -> Workload:
    """Return the work of a device that has seen one call."""
    work = Workload(places_count)
    work.note(KIND, alone_s, alone_s)
    return work


def test_a_call_alone_waits_for_nothing(clock: StandingClock) -> None:
    assert known().estimate_wait("a", ALONE_S).delay_s == 0


def test_a_call_waits_for_the_calls_before_it(clock: StandingClock) -> None:
    work = known()
    for peer in "aab":
        work.add(peer, ALONE_S)

    assert work.total_s == pytest.approx(3 * ALONE_S)
    assert work.estimate_wait("a", ALONE_S).delay_s == pytest.approx(3 * ALONE_S)
    for peer in "aab":
        work.remove(peer, ALONE_S)
    assert work.total_s == 0
    assert work.estimate_wait("c", ALONE_S).delay_s == 0


def test_a_peers_call_waits_for_no_more_of_others_than_it_has_itself(clock: StandingClock) -> None:
    work = known()
    work.add("b", ALONE_S)
    for _ in range(9):
        work.add("a", ALONE_S)

    assert work.estimate_wait("b", ALONE_S).delay_s <= ALONE_S * (1 + 2)


def test_a_longer_call_delays_a_shorter_one_by_the_length_of_that(clock: StandingClock) -> None:
    work = known()
    work.add("a", 10.0)

    assert work.estimate_wait("a", ALONE_S).delay_s == pytest.approx(ALONE_S)


def test_further_calls_of_a_peer_leave_room_for_one_of_a_peer_that_has_called_lately(
    clock: StandingClock,
) -> None:
    work = known()
    work.add("b", ALONE_S)
    work.remove("b", ALONE_S)
    for _ in range(3):
        work.add("a", ALONE_S)
        work.remove("a", ALONE_S)
    work.add("a", ALONE_S)

    assert work.estimate_wait("a", ALONE_S).delay_s == pytest.approx(2 * ALONE_S)
    work.remove("a", ALONE_S)
    assert work.estimate_wait("a", ALONE_S).delay_s == 0  # its only one leaves none
    clock.now_s = 11
    work.add("a", ALONE_S)
    assert work.estimate_wait("a", ALONE_S).delay_s == pytest.approx(ALONE_S)


def test_a_peer_that_uses_little_beside_a_flood_waits_for_its_own_calls_alone(
    clock: StandingClock,
) -> None:
    work = known()
    for peer in "aaaaaaaaab":
        work.add(peer, ALONE_S)

    assert work.estimate_wait("b", ALONE_S).delay_s == pytest.approx(ALONE_S)
    for _ in range(8):
        work.add("b", ALONE_S)
    assert work.estimate_wait("b", ALONE_S).delay_s == pytest.approx(18 * ALONE_S)


class TestLearning:
    """How long calls take alone is between their share of the time and all of it."""

    def test_an_unknown_kind_is_taken_to_cost_as_much_as_others_do(self) -> None:
        work = known(alone_s=0.1)

        assert work.mean_s == pytest.approx(0.1)

    def test_a_call_that_is_brief_is_no_work(self) -> None:
        work = Workload(2)
        work.note(KIND, 0.0009, 0.0009)
        assert (work.alone_s[KIND], work.mean_s) == (0, 0)

        work.note(KIND, 0.5, 0.5)  # a hiccup of the machine
        assert work.alone_s[KIND] < 0.05

    def test_calls_that_share_the_device_are_known_by_their_shares(self) -> None:
        work = Workload(4)
        for _ in range(50):
            work.note(KIND, 2 * ALONE_S, ALONE_S)

        assert work.alone_s[KIND] == pytest.approx(ALONE_S)
        assert work.parallelism == pytest.approx(1)

    def test_calls_that_do_not_slow_each_other_down_count_for_less(
        self, clock: StandingClock
    ) -> None:
        work = known(places_count=4)
        for _ in range(50):
            work.note(KIND, ALONE_S, ALONE_S / 3)
        work.add("a", ALONE_S)

        assert work.alone_s[KIND] == pytest.approx(ALONE_S)
        assert work.parallelism == pytest.approx(3, abs=0.2)
        assert work.estimate_wait("a", ALONE_S).delay_s == pytest.approx(ALONE_S / work.parallelism)

    def test_a_device_that_becomes_faster_or_slower_is_noticed(self) -> None:
        work = known()
        work.note(KIND, ALONE_S / 2, ALONE_S / 2)
        assert work.alone_s[KIND] == ALONE_S / 2

        for _ in range(100):
            work.note(KIND, 4 * ALONE_S, 2 * ALONE_S)
        assert work.alone_s[KIND] == pytest.approx(2 * ALONE_S / 1.25, rel=0.05)

    def test_of_many_kinds_the_oldest_are_forgotten(self) -> None:
        work = Workload(2)
        for kind in range(2000):
            work.note(kind, 0.0, 0.0)

        assert [*work.alone_s] == [*range(2000 - 1024, 2000)]

    def test_peers_that_have_gone_are_forgotten(self, clock: StandingClock) -> None:
        work = known()
        for number in range(2000):
            clock.now_s = number
            work.add(str(number), ALONE_S)
            work.remove(str(number), ALONE_S)

        assert len(work._peers) <= 11


@dataclass
class _RunningCall:
    """A call on the device of `simulate`."""

    peer: str
    due_s: float
    cost_s: float
    left_s: float
    span: PlaceSpan = field(default_factory=lambda: PlaceSpan(CallContext()))


def simulate(
    clock: StandingClock, calls_per_s: Mapping[str, float], duration_s: float, seed: int = 0
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return how long each peer's accepted calls take, in the time of one alone, and how many are refused.

    Calls come at random times to a device of two places, which takes `ALONE_S` for each, and twice as long for two at
    once. What is refused does not come back.
    """
    generator = random.Random(seed)
    work, places, queue, limit = Workload(2), PlaceClock(), FairQueue(), WaitLimit()
    arrivals: list[tuple[float, str]] = []
    for peer, rate in calls_per_s.items():
        due_s = 0.0
        while (due_s := due_s + generator.expovariate(rate)) < duration_s:
            arrivals.append((due_s, peer))
    arrivals.sort()
    times: dict[str, list[float]] = {peer: [] for peer in calls_per_s}
    refused = dict.fromkeys(calls_per_s, 0)
    waiting: dict[Ticket, _RunningCall] = {}
    running: list[_RunningCall] = []

    def start(call: _RunningCall) -> None:
        places.begin(call.span)
        running.append(call)

    while arrivals or running:
        first_left_s = min((call.left_s for call in running), default=0.0) * len(running)
        end_s = clock.now_s + first_left_s if running else float("inf")
        begin_s = arrivals[0][0] if arrivals else float("inf")
        passed_s = min(begin_s, end_s) - clock.now_s
        for call in running:
            call.left_s -= passed_s / len(running)
        clock.now_s += passed_s
        if begin_s < end_s:
            _, peer = arrivals.pop(0)
            cost_s = work.alone_s.get(KIND, work.mean_s)
            delay_s, is_overloaded = work.estimate_wait(peer, cost_s)
            if delay_s > limit.limit_s(cost_s, None, is_overloaded=is_overloaded):
                work.refuse(cost_s)
                refused[peer] += 1
                continue
            work.add(peer, cost_s)
            call = _RunningCall(peer, clock.now_s, cost_s, ALONE_S)
            if len(running) < 2 and not queue:
                start(call)
            else:
                ticket = Ticket(KIND, 0, 0, peer, 0.0, None, cost_s)  # type: ignore[arg-type]  # nobody waits
                queue.add(ticket)
                waiting[ticket] = call
        else:
            call = min(running, key=lambda one: one.left_s)
            running.remove(call)
            places.end(call.span)
            work.remove(call.peer, call.cost_s)
            work.note(KIND, call.span.place_s, call.span.share_s)
            times[call.peer].append((clock.now_s - call.due_s) / ALONE_S)
            if queue:
                ticket = queue[0]
                queue.take_out(ticket, has_started=True)
                start(waiting.pop(ticket))
    return times, refused


CAPACITY_PER_S = 1 / ALONE_S


@pytest.mark.parametrize("peers", ["a", "abcdefgh"])
def test_at_twice_the_capacity_accepted_calls_take_at_most_three_times_as_long_as_alone(
    clock: StandingClock, peers: str
) -> None:
    rates = {peer: 2 * CAPACITY_PER_S / len(peers) for peer in peers}

    times, refused = simulate(clock, rates, 60)

    accepted = np.concatenate([*times.values()])
    assert np.percentile(accepted, 99) <= 3
    assert len(accepted) >= 0.75 * 60 * CAPACITY_PER_S
    assert sum(refused.values()) > 0.4 * len(accepted)


@pytest.mark.parametrize(("part", "refused_part"), [(0.1, 0.005), (0.25, 0.03), (0.5, 0.12)])
def test_a_device_that_has_little_to_do_refuses_little(
    clock: StandingClock, part: float, refused_part: float
) -> None:
    times, refused = simulate(clock, {"a": part * CAPACITY_PER_S}, 120)

    assert refused["a"] <= refused_part * (len(times["a"]) + refused["a"])


@pytest.mark.parametrize("part", [0.1, 0.25, 0.4])
def test_a_flood_of_one_peer_leaves_the_calls_of_another_within_three_times_what_they_take_without(
    clock: StandingClock, part: float
) -> None:
    alone, alone_refused = simulate(clock, {"a": part * CAPACITY_PER_S}, 60)
    clock.now_s = 0

    rates = {"a": part * CAPACITY_PER_S, "flood": 2 * CAPACITY_PER_S}
    times, refused = simulate(clock, rates, 60)

    assert np.percentile(times["a"], 99) <= 3 * np.percentile(alone["a"], 99)
    assert refused["a"] <= alone_refused["a"] + part * len(alone["a"])
    assert refused["flood"] > len(times["flood"])
    assert len(times["flood"]) > 0.4 * 60 * CAPACITY_PER_S


@pytest.mark.parametrize("is_overloaded", [False, True])
@pytest.mark.parametrize(
    ("longest_s", "cost_s", "limits_s"),
    [(None, 0.001, (0.03, 0.03)), (None, 2, (4.4, 3)), (0.5, 2, (0.5, 0.5))],
)
def test_the_limit_follows_the_length_of_a_call_unless_the_operator_says_how_long(
    longest_s: float | None, cost_s: float, limits_s: tuple[float, float], is_overloaded: bool
) -> None:
    limit_s = limits_s[is_overloaded]
    limit = WaitLimit(longest_s)

    assert limit.limit_s(cost_s, None, is_overloaded=is_overloaded) == pytest.approx(limit_s)
    assert limit.limit_s(cost_s, 0.01, is_overloaded=is_overloaded) == 0.01
    waits_s = limit.limit_s(cost_s, 60.0, is_overloaded=is_overloaded, waits=True)
    assert waits_s == (longest_s or 60.0)


def test_a_sum_forgets_half_of_itself_in_its_time() -> None:
    total = DecayingSum(2.0)
    assert total.total(5.0) == 0
    total.add(4.0, 5.0)
    total.add(2.0, 7.0)

    assert total.total(7.0) == pytest.approx(4.0)
    assert total.total(11.0) == pytest.approx(1.0)


def test_a_sum_of_a_constant_rate_is_what_comes_in_its_window() -> None:
    total = DecayingSum(0.35)
    for number in range(10_000):
        total.add(0.003, number * 1e-3)

    assert total.total(10.0) / total.window_s == pytest.approx(3.0, rel=0.01)
