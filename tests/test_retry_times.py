"""When failed calls are tried again, to the moment: on a clock that goes on only while somebody sleeps."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    InvalidArgumentError,
    UnavailableError,
)
from deconvd_client.calls import deadline as deadline_module
from deconvd_client.calls.cancel_scope import CancelScope
from deconvd_client.calls.deadline import Deadline
from deconvd_client.transports import retry_policy
from deconvd_client.transports.retry_policy import (
    PinnedTransportError,
    RetriedElsewhere,
    RetryPolicy,
    WorkerAwayError,
)

AWAY = UnavailableError("nobody listens")
STOPPING = CallCancelledError("it stops")
RUNS_COUNT = 300


class Clock:
    """A clock, and what was slept by it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleeps_s: list[float] = []
        self.on_sleep: Callable[[], None] = lambda: None

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        assert duration_s > 0
        self.sleeps_s.append(duration_s)
        self.now_s += duration_s
        self.on_sleep()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (retry_policy, deadline_module):
        monkeypatch.setattr(module, "time", clock)
    random.seed(64)
    return clock


def full(retry_after_s: float) -> UnavailableError:
    return UnavailableError("the server is full", retry_after_s=retry_after_s)


def tried_s(
    clock: Clock,
    policy: RetryPolicy,
    timeout_s: float,
    *errors: DeconvdError,
    forever: bool = False,
) -> list[float]:
    """Return when a call was tried, from its begin, that fails with these errors, the last of them forever or once."""
    begin_s, times_s = clock.now_s, list[float]()

    def attempt() -> None:
        times_s.append(clock.now_s - begin_s)
        if forever or len(times_s) <= len(errors):
            raise errors[min(len(times_s), len(errors)) - 1]

    deadline = Deadline(timeout_s)
    if forever:
        with pytest.raises(type(errors[-1])):
            policy.run(attempt, deadline)
    else:
        policy.run(attempt, deadline)
    return times_s


def reached() -> RetryPolicy:
    """Return the policy of a connection whose server has answered."""
    policy = RetryPolicy()
    policy.run(lambda: None, Deadline(1))
    return policy


def test_pauses_double_from_fifty_milliseconds_to_a_second_and_each_is_shortened_by_up_to_half(
    clock: Clock,
) -> None:
    pauses_s = np.array(
        [np.diff(tried_s(clock, reached(), 1000, *[AWAY] * 7)) for _ in range(RUNS_COUNT)]
    )

    longest_s = np.array([0.05, 0.1, 0.2, 0.4, 0.8, 1, 1])
    assert np.all(pauses_s.max(0) <= longest_s + 1e-6)
    assert np.all(pauses_s.max(0) >= 0.95 * longest_s)
    assert np.all(pauses_s.min(0) >= longest_s / 2 - 1e-6)
    assert np.all(pauses_s.min(0) <= 0.55 * longest_s)


def test_a_server_that_never_answered_is_given_up_after_five_seconds(clock: Clock) -> None:
    for error in (AWAY, STOPPING):
        assert 4.98 < tried_s(clock, RetryPolicy(), 60, error, forever=True)[-1] < 5


@pytest.mark.parametrize("answer", [InvalidArgumentError("x"), full(0)], ids=str)
@pytest.mark.parametrize("error", [AWAY, STOPPING], ids=str)
def test_a_server_that_has_answered_or_refused_is_tried_until_the_deadline(
    clock: Clock, answer: DeconvdError, error: DeconvdError
) -> None:
    refused = RetryPolicy()
    tried_s(clock, refused, 0.01, answer, forever=True)

    for policy in (reached(), refused):
        assert 59.98 < tried_s(clock, policy, 60, error, forever=True)[-1] < 60


def test_the_last_pause_is_half_of_the_time_that_is_left(clock: Clock) -> None:
    times_s = [tried_s(clock, reached(), 0.06, AWAY)[1] for _ in range(RUNS_COUNT)]

    assert max(times_s) == pytest.approx(0.03)


@pytest.mark.parametrize(("timeout_s", "tries_count"), [(0.02, 2), (0.0199, 1)])
def test_with_less_than_twenty_milliseconds_left_nothing_is_tried_again(
    clock: Clock, timeout_s: float, tries_count: int
) -> None:
    policy = reached()

    assert len(tried_s(clock, policy, timeout_s, AWAY, forever=True)) == tries_count


@pytest.mark.parametrize(
    ("retry_after_s", "spread_s"), [(0.0, 0.025), (0.3, 0.175), (7.0, 1.025)], ids=str
)
def test_what_a_server_says_is_kept_to_and_calls_come_back_over_half_as_long_again(
    clock: Clock, retry_after_s: float, spread_s: float
) -> None:
    first_s = retry_after_s + 0.025

    times_s = [tried_s(clock, RetryPolicy(), 60, full(retry_after_s))[1] for _ in range(RUNS_COUNT)]

    assert first_s <= min(times_s) < first_s + spread_s / 10
    assert first_s + 0.9 * spread_s < max(times_s) <= first_s + spread_s + 1e-6


def test_pauses_that_a_server_asks_for_do_not_grow_by_themselves(clock: Clock) -> None:
    times_s = tried_s(clock, RetryPolicy(), 60, *[full(0.1)] * 20)

    assert max(np.diff(times_s)) <= 0.2


def test_a_further_call_waits_as_long_as_those_that_were_refused(clock: Clock) -> None:
    policy = RetryPolicy()
    tried_s(clock, policy, 1, full(100), forever=True)

    clock.now_s += 40
    assert 60 < tried_s(clock, policy, 600)[0] <= 61.05
    clock.now_s += 100
    assert tried_s(clock, policy, 600) == [0]


@pytest.mark.parametrize(("passed_s", "waits"), [(99.5, True), (100, False), (100.5, False)])
def test_a_further_call_waits_until_the_time_that_the_server_said_and_no_longer(
    clock: Clock, passed_s: float, *, waits: bool
) -> None:
    policy = RetryPolicy()
    tried_s(clock, policy, 1, full(100), forever=True)

    clock.now_s += passed_s
    assert (tried_s(clock, policy, 600)[0] > 0) == waits


def test_a_further_call_with_just_the_time_that_it_would_wait_does_not_wait(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_policy, "random", SimpleNamespace(uniform=lambda _, most: most))
    policy = RetryPolicy()
    tried_s(clock, policy, 1, full(100), forever=True)
    (waits_s,) = tried_s(clock, policy, 600)

    clock.now_s -= waits_s
    assert tried_s(clock, policy, waits_s) == [0]
    assert tried_s(clock, policy, waits_s + 1e-6) == [waits_s]


@pytest.mark.parametrize(("fail_fast", "tries_count"), [(False, 2), (True, 1)])
def test_a_worker_that_is_away_is_tried_again_unless_failures_are_to_be_fast_and_holds_no_other_call(
    clock: Clock, tries_count: int, *, fail_fast: bool
) -> None:
    policy = RetryPolicy(fail_fast=fail_fast)
    away = WorkerAwayError("one is away", retry_after_s=0.6)

    assert len(tried_s(clock, policy, 1, away, forever=True)) == tries_count
    assert tried_s(clock, policy, 60) == [0]


def test_a_further_call_does_not_wait_beyond_its_deadline_nor_if_it_computes_nothing(
    clock: Clock,
) -> None:
    policy = RetryPolicy()
    tried_s(clock, policy, 1, full(100), forever=True)

    assert tried_s(clock, policy, 100) == [0]
    begin_s = clock.now_s
    assert policy.run(lambda: clock.now_s, Deadline(600), waits_while_full=False) == begin_s


@pytest.mark.parametrize(("timeout_s", "tries_count"), [(0.425, 1), (0.426, 2)])
def test_a_time_that_is_not_before_the_deadline_is_not_waited_for(
    clock: Clock, timeout_s: float, tries_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_policy, "random", SimpleNamespace(uniform=lambda _, most: most))

    times_s = tried_s(clock, RetryPolicy(), timeout_s, full(0.25), forever=True)

    assert len(times_s) == tries_count


def test_a_server_that_is_full_and_then_away_has_answered(clock: Clock) -> None:
    assert tried_s(clock, RetryPolicy(), 60, full(0.1), AWAY, forever=True)[-1] > 59


@pytest.mark.parametrize("error", [AWAY, STOPPING], ids=str)
def test_a_cancelled_call_is_not_tried_again(clock: Clock, error: DeconvdError) -> None:
    deadline = Deadline(60)
    deadline.scope = CancelScope()
    times_s: list[float] = []

    def attempt() -> None:
        times_s.append(clock.now_s)
        raise error

    def cancel_in_the_third_pause() -> None:
        if len(times_s) == 3 and deadline.scope is not None:
            deadline.scope.cancel()

    clock.on_sleep = cancel_in_the_third_pause
    policy = reached()
    with pytest.raises(type(error)):
        policy.run(attempt, deadline)

    assert len(times_s) == 4  # the last finds out, and raises
    assert clock.now_s - times_s[2] <= 0.1 + 1e-6  # the pause is cut short

    times_s.clear()
    with pytest.raises(type(error)):
        policy.run(attempt, deadline)
    assert len(times_s) == 1


def test_fail_fast_gives_up_who_is_away_and_nobody_else(clock: Clock) -> None:
    policy = RetryPolicy(fail_fast=True)

    assert len(tried_s(clock, policy, 60, AWAY, forever=True)) == 1
    assert len(tried_s(clock, policy, 60, full(0.1), STOPPING)) == 3
    assert len(tried_s(clock, policy, 60, AWAY, forever=True)) == 1


@pytest.mark.parametrize(
    "error", [InvalidArgumentError("x"), PinnedTransportError("no such way")], ids=str
)
def test_what_cannot_help_is_not_tried_again(clock: Clock, error: DeconvdError) -> None:
    assert len(tried_s(clock, reached(), 60, error, forever=True)) == 1


def test_a_connection_that_closes_is_noticed_within_a_tenth_of_a_second(clock: Clock) -> None:
    policy = reached()
    clock.on_sleep = policy.stop

    times_s = tried_s(clock, policy, 60, full(30), forever=True)

    assert times_s == [0, pytest.approx(0.1)]


def test_a_pause_is_slept_in_tenths_of_a_second(clock: Clock) -> None:
    (_, again_s) = tried_s(clock, reached(), 60, full(1))

    assert max(clock.sleeps_s) == pytest.approx(0.1)
    assert sum(clock.sleeps_s) == pytest.approx(again_s)


def test_a_closed_connection_tries_once(clock: Clock) -> None:
    policy = reached()
    policy.stop()

    assert len(tried_s(clock, policy, 60, full(0.1), forever=True)) == 1


def test_a_call_that_succeeds_returns_what_it_has(clock: Clock) -> None:
    assert RetryPolicy().run(lambda: "done", Deadline(1)) == "done"
    assert RetryPolicy().run_once(lambda: "done", Deadline(1)) == "done"


@pytest.mark.parametrize("run", [RetryPolicy.run, RetryPolicy.run_once])
def test_a_deadline_in_the_first_try_names_its_limit(
    clock: Clock, run: Callable[[RetryPolicy, Callable[[], None], Deadline], None]
) -> None:
    def attempt() -> None:
        raise DeadlineError("too long")

    with pytest.raises(DeadlineError) as raised:
        run(RetryPolicy(), attempt, Deadline(7.5))

    assert str(raised.value) == (
        "the call took longer than the 7.5 s that timeout_s of connect() allows "
        "(--timeout-s of the command): too long"
    )


def test_a_deadline_that_cuts_a_later_try_short_does_not_hide_why_there_were_others(
    clock: Clock,
) -> None:
    errors = iter([STOPPING, AWAY, DeadlineError("too long")])

    def attempt() -> None:
        raise next(errors)

    with pytest.raises(UnavailableError) as raised:
        reached().run(attempt, Deadline(60))

    assert raised.value is AWAY


def test_a_try_alone_is_tried_once(clock: Clock) -> None:
    tries = []

    def attempt() -> None:
        tries.append(clock.now_s)
        raise AWAY

    with pytest.raises(UnavailableError, match="nobody listens"):
        RetryPolicy().run_once(attempt, Deadline(60))

    assert tries == [0]


@pytest.mark.parametrize(
    ("error", "serves", "told_s"),
    [
        pytest.param(AWAY, False, None, id="all of its workers are away"),
        pytest.param(AWAY, True, 0.2, id="one is away"),
        pytest.param(UnavailableError("full", retry_after_s=3.0), False, 3.0, id="it is full"),
        pytest.param(UnavailableError("full", retry_after_s=3.0), True, 3.0, id="one is full"),
    ],
)
def test_a_server_with_one_worker_away_counts_as_reached_and_is_tried_once(
    clock: Clock, error: UnavailableError, *, serves: bool, told_s: float | None
) -> None:
    tries = []

    def attempt() -> None:
        tries.append(clock.now_s)
        raise error

    with pytest.raises(UnavailableError, match=str(error)) as raised:
        RetriedElsewhere(lambda: serves).run(attempt, Deadline(60))

    assert tries == [0]
    assert raised.value.retry_after_s == told_s
