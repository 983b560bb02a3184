"""A call: it ends at its deadline or when the caller goes, and tells whoever asked exactly once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from deconvd.errors import CallCancelledError, DeadlineError, UnavailableError
from deconvd_server.call.context import CallContext


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Let Python switch between threads as often as it can, so that races show."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


def test_a_call_without_a_deadline_goes_on() -> None:
    call = CallContext()

    call.check()

    assert call.remaining_s() is None


def test_a_call_before_its_deadline_goes_on() -> None:
    call = CallContext(timeout_s=1000)

    call.check()

    remaining_s = call.remaining_s()
    assert remaining_s is not None
    assert 0 < remaining_s <= 1000


@pytest.mark.parametrize("timeout_s", [0.0, -5.0])
def test_a_call_past_its_deadline_has_0_seconds_left_and_ends(timeout_s: float) -> None:
    call = CallContext(timeout_s)

    assert call.remaining_s() == 0
    with pytest.raises(DeadlineError, match="deadline passed before its work was done"):
        call.check()


def test_a_cancelled_call_ends_as_cancelled_though_its_deadline_passed_too() -> None:
    call = CallContext(timeout_s=0)

    call.cancel()

    with pytest.raises(CallCancelledError, match="the caller gave the call up"):
        call.check()


def test_those_who_asked_are_told_once_and_in_order() -> None:
    call, told = CallContext(), []
    call.on_cancel(lambda: told.append("first"))
    call.on_cancel(lambda: told.append("second"))
    assert told == []

    call.cancel()
    call.cancel()

    assert told == ["first", "second"]


def test_who_asks_after_the_end_is_told_at_once() -> None:
    call, told = CallContext(), []
    call.cancel()

    call.on_cancel(lambda: told.append("late"))

    assert told == ["late"]


def test_the_call_has_ended_by_the_time_anyone_is_told() -> None:
    call, raised = CallContext(), []

    def check() -> None:
        with pytest.raises(CallCancelledError):
            call.check()
        raised.append(True)

    call.on_cancel(check)
    call.cancel()

    assert raised == [True]


def test_who_is_told_may_ask_again() -> None:
    call, told = CallContext(), []

    call.on_cancel(lambda: call.on_cancel(lambda: told.append("again")))
    call.cancel()

    assert told == ["again"]


def test_of_askers_who_race_with_the_end_each_is_told_once(
    eager_switching: None,
) -> None:
    threads_count, rounds_count = 4, 300
    start = threading.Barrier(threads_count)

    def ask(call: CallContext, told: list[int], thread: int) -> None:
        start.wait(10)
        if thread == 0:
            call.cancel()
        else:
            call.on_cancel(lambda: told.append(thread))

    with ThreadPoolExecutor(threads_count) as pool:
        for _ in range(rounds_count):
            call, told = CallContext(), list[int]()
            list(
                pool.map(ask, [call] * threads_count, [told] * threads_count, range(threads_count))
            )
            assert sorted(told) == [1, 2, 3]


def test_a_call_that_the_server_stops_ends_as_cancelled_and_says_why() -> None:
    call, why = CallContext(), UnavailableError("others ask", retry_after_s=1)
    heard: list[CallContext] = []
    call.on_cancel(lambda: heard.append(call))

    call.stop(why)
    call.stop(DeadlineError("too late to be the reason"))

    assert heard == [call]
    assert call.stop_error is why
    with pytest.raises(CallCancelledError):
        call.check()


def test_a_call_whose_caller_has_gone_is_not_stopped_any_more() -> None:
    call = CallContext()
    call.cancel()

    call.stop(DeadlineError("nobody hears it"))

    assert call.stop_error is None
