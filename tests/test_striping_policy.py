"""How many stripes calls have: bounded by processors and bytes, and in the end those that are the fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deconvd.direct.pieces import PIECE_BYTES
from deconvd_client.transports.direct.striping_policy import STREAM, StripingPolicy

LARGE_BYTES = 64 * PIECE_BYTES
"""So much that all numbers of stripes are allowed."""

LEARNT_COUNT = 12
"""Calls after which every candidate has been tried three times."""

Pace = Callable[[int], float]
"""How long a call takes, by the choice for it."""


def run_calls(
    policy: StripingPolicy, pace: Pace, calls_count: int, size_bytes: int = LARGE_BYTES
) -> Counter[int]:
    """Make calls as the policy has it, and return how often each choice was made."""
    choices: Counter[int] = Counter()
    for _ in range(calls_count):
        choice = policy.choose("call", size_bytes)
        policy.record("call", size_bytes, choice, pace(choice))
        choices[choice] += 1
    return choices


@pytest.mark.parametrize(
    ("processors_count", "pieces_count", "choices"),
    [
        (1, 2000, [STREAM]),
        (2, 2000, [STREAM]),
        (3, 2000, [STREAM]),
        (4, 2000, [STREAM, 2]),
        (8, 2000, [STREAM, 2, 4]),
        (15, 2000, [STREAM, 2, 4]),
        (16, 2000, [STREAM, 2, 4, 8]),
        (200, 2000, [STREAM, 2, 4, 8]),
        (200, 0, [STREAM]),
        (200, 6, [STREAM]),
        (200, 8, [STREAM, 2]),
        (200, 16, [STREAM, 2, 4]),
        (200, 30, [STREAM, 2, 4]),
        (200, 32, [STREAM, 2, 4, 8]),
    ],
)
def test_processors_and_bytes_bound_the_stripes(
    processors_count: int, pieces_count: int, choices: list[int]
) -> None:
    policy = StripingPolicy(lambda: processors_count)
    size_bytes = pieces_count * PIECE_BYTES
    assert list(policy.candidates(size_bytes)) == choices
    made = run_calls(policy, lambda choice: 1 + choice, 300, size_bytes)
    assert sorted(made) == choices


def test_a_server_that_many_call_limits_the_stripes_until_it_says_otherwise() -> None:
    policy = StripingPolicy(lambda: 16)
    policy.limit_stripes(2)
    assert sorted(run_calls(policy, lambda choice: 9 - choice, 300)) == [STREAM, 2]
    policy.limit_stripes(0)
    assert list(policy.candidates(LARGE_BYTES)) == [STREAM, 2]
    policy.limit_stripes(8)
    assert list(policy.candidates(LARGE_BYTES)) == [STREAM, 2, 4, 8]
    assert run_calls(policy, lambda choice: 9 - choice, 300)[8] > 250


def test_four_stripes_are_tried_first_and_all_candidates_in_turn() -> None:
    policy = StripingPolicy(lambda: 16)
    choices = []
    for _ in range(LEARNT_COUNT):
        choices.append(policy.choose("call", LARGE_BYTES))
        policy.record("call", LARGE_BYTES, choices[-1], 1.0)
    assert choices == [4, 2, STREAM, 8] * 3


@settings(max_examples=40)
@given(
    durations_s=st.permutations([1.0, 1.2, 2.0, 3.0]),
    processors_count=st.integers(4, 64),
)
def test_the_fastest_way_is_used_but_for_rare_trials(
    durations_s: list[float], processors_count: int
) -> None:
    policy = StripingPolicy(lambda: processors_count)
    candidates = policy.candidates(LARGE_BYTES)
    pace = dict(zip(candidates, durations_s, strict=False))
    run_calls(policy, pace.__getitem__, LEARNT_COUNT)
    calls_count = 1000
    made = run_calls(policy, pace.__getitem__, calls_count)
    best = min(candidates, key=pace.__getitem__)
    assert made[best] >= calls_count * (1 - 3 / 192) - 3
    assert len(made) > 1


def test_trials_of_a_much_slower_way_take_little_time() -> None:
    policy = StripingPolicy(lambda: 16)
    durations_s = {STREAM: 0.1, 2: 0.7, 4: 1.0, 8: 1.0}
    run_calls(policy, durations_s.__getitem__, LEARNT_COUNT)
    made = run_calls(policy, durations_s.__getitem__, 10_000)
    lost_s = made[2] * (durations_s[2] - durations_s[STREAM])
    assert made[2] >= 5
    assert lost_s < 0.01 * made[STREAM] * durations_s[STREAM]


@pytest.mark.parametrize("best", [STREAM, 2, 4, 8])
def test_disturbed_calls_do_not_hide_the_fastest_way(best: int) -> None:
    made: Counter[int] = Counter()
    for seed in range(20):
        chance = Random(seed)
        policy = StripingPolicy(lambda: 16)

        def pace(choice: int, chance: Random = chance) -> float:
            return (1.0 if choice == best else 2.0) * chance.choice([1.0, 1.0, 1.1, 3.0, 10.0])

        run_calls(policy, pace, 500)
        made += run_calls(policy, pace, 1000)
    assert made[best] > 0.9 * made.total()


@settings(max_examples=40)
@given(
    before=st.sampled_from([STREAM, 2, 4, 8]),
    after=st.sampled_from([STREAM, 2, 4, 8]),
)
def test_another_network_is_noticed(before: int, after: int) -> None:
    policy = StripingPolicy(lambda: 16)
    ways = policy.candidates(LARGE_BYTES)

    def slope_to(best: int) -> Pace:
        return lambda choice: 1.0 + abs(ways.index(choice) - ways.index(best))

    run_calls(policy, slope_to(before), 500)
    run_calls(policy, slope_to(after), 192 * 8)
    made = run_calls(policy, slope_to(after), 1000)
    assert made[after] >= 980


def test_calls_of_each_kind_and_size_learn_by_themselves() -> None:
    policy = StripingPolicy(lambda: 16)
    run_calls(policy, lambda choice: 1 + choice, 50)
    assert policy.choose("call", LARGE_BYTES) == STREAM
    assert policy.choose("call", 2 * LARGE_BYTES - 1) == STREAM  # of the same class
    assert policy.choose("call", 2 * LARGE_BYTES) == 4
    assert policy.choose("another", LARGE_BYTES) == 4


def test_sizes_of_one_class_are_compared_by_the_byte() -> None:
    policy = StripingPolicy(lambda: 16)
    chance = Random(0)
    speeds = {STREAM: 1e9, 2: 1.1e9, 4: 1.3e9, 8: 1.2e9}
    made: Counter[int] = Counter()
    for _ in range(1000):
        size_bytes = chance.randrange(LARGE_BYTES, 2 * LARGE_BYTES)
        choice = policy.choose("call", size_bytes)
        policy.record("call", size_bytes, choice, size_bytes / speeds[choice])
        made[choice] += 1
    assert made[4] >= 970


@pytest.mark.parametrize(
    ("link_rate", "connection_rate", "bests"),
    [
        pytest.param(125e6, 3e9, {STREAM}, id="1 Gbit/s: both ways at once are worth more"),
        pytest.param(25e9, 3e9, {8}, id="a fast network: a connection is the bottleneck"),
        pytest.param(12e9, 3e9, {4, 8}, id="four connections fill it"),
    ],
)
def test_slow_links_keep_streams_and_fast_ones_get_stripes(
    link_rate: float, connection_rate: float, bests: set[int]
) -> None:
    """A stream is sent and received at once. Stripes are half-duplex: they receive once all is sent."""
    policy = StripingPolicy(lambda: 16)
    there_bytes, back_bytes, overhead_s = LARGE_BYTES // 3, 2 * LARGE_BYTES // 3, 2e-4

    def pace(choice: int) -> float:
        if choice == STREAM:
            return overhead_s + max(there_bytes, back_bytes) / min(connection_rate, link_rate)
        rate = min(choice * connection_rate, link_rate)
        return choice * overhead_s + (there_bytes + back_bytes) / rate

    run_calls(policy, pace, LEARNT_COUNT)
    made = run_calls(policy, pace, 1000)
    assert sum(made[best] for best in bests) >= 980


def test_threads_may_choose_and_record_at_the_same_time() -> None:
    policy = StripingPolicy(lambda: 16)
    durations_s = {STREAM: 2.0, 2: 1.5, 4: 1.0, 8: 1.2}
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(run_calls, policy, durations_s.__getitem__, 500) for _ in range(8)]
        for run in runs:
            run.result()
    assert run_calls(policy, durations_s.__getitem__, 1000)[4] >= 980
