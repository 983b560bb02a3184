"""Admission: how long calls keep each other waiting, on a clock that the tests move, and who goes on first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from deconvd.errors import CallCancelledError, DeadlineError, ExhaustedError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.device import TURN_S
from deconvd_server.engine import admission as admission_module
from deconvd_server.engine import place_clock, queue_limits
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.load import Load
from tests.clocks import StandingClock, stop_clock
from tests.processes import wait_until

TIMEOUT_S = 30
BRIEF_S = 0.2
IDLE = Load(running_count=0, waiting_count=0, used_bytes=0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StandingClock:
    return stop_clock(monkeypatch, admission_module, queue_limits, place_clock)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def waiting(
    threads: ThreadPoolExecutor, admission: Admission, footprint_bytes: int, peer: str = ""
) -> Future[None]:
    """Return a call that waits to enter."""
    count = admission.load.waiting_count
    call = CallContext(TIMEOUT_S, peer_key=peer)
    entered = threads.submit(admission.enter, footprint_bytes, call)
    wait_until(lambda: admission.load.waiting_count > count)
    return entered


def keep_answer(admission: Admission, size_bytes: int, peer: str = "hog") -> CallContext:
    """Return a call that is computed, and whose answer has not left."""
    call = CallContext(TIMEOUT_S, peer_key=peer)
    with admission.admit(size_bytes, call, lasting_bytes=size_bytes):
        pass
    return call


def test_a_call_that_lacks_the_bytes_of_answers_keeps_others_waiting_for_two_seconds(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission = Admission(4, 100, 8)
    unread = keep_answer(admission, 41)
    large = waiting(threads, admission, 60)

    clock.now_s = 1.99
    with pytest.raises(DeadlineError):
        admission.enter(1, CallContext(BRIEF_S))
    clock.now_s = 2.0
    admission.enter(1, CallContext(TIMEOUT_S))

    admission.leave(1)
    assert not large.done()
    unread.end()
    large.result(TIMEOUT_S)
    admission.leave(60)
    assert admission.load == IDLE


def test_a_call_that_lacks_the_bytes_of_calls_that_run_keeps_others_waiting_until_it_fits(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission = Admission(4, 100, 8)
    unread = keep_answer(admission, 40)
    admission.enter(10, CallContext())
    large = waiting(threads, admission, 60)

    clock.now_s = 1000
    with pytest.raises(DeadlineError):
        admission.enter(1, CallContext(BRIEF_S))

    admission.leave(10)
    large.result(TIMEOUT_S)
    admission.leave(60)
    unread.end()


@pytest.mark.parametrize("is_due", [True, False], ids=["due", "not due"])
def test_calls_that_take_long_have_half_of_the_places_while_others_come(
    clock: StandingClock, threads: ThreadPoolExecutor, is_due: bool
) -> None:
    places_count = 4
    admission = Admission(places_count, 1000, 8)
    for _ in range(places_count):
        admission.enter(1, CallContext())
    first = waiting(threads, admission, 1)
    resumed = threads.submit(admission.yield_turn, CallContext(TIMEOUT_S))
    first.result(TIMEOUT_S)
    second = waiting(threads, admission, 1)

    clock.now_s = TURN_S / places_count if is_due else 0.99 * TURN_S / places_count
    admission.leave(1)
    following, other = (resumed, second) if is_due else (second, resumed)
    following.result(TIMEOUT_S)

    assert not other.done()
    admission.leave(1)
    other.result(TIMEOUT_S)
    for _ in range(places_count):
        admission.leave(1)
    assert admission.load == IDLE


def test_calls_that_take_long_take_turns_though_no_other_comes(
    threads: ThreadPoolExecutor,
) -> None:
    admission = Admission(1, 100, 8)
    admission.enter(1, CallContext())
    second = waiting(threads, admission, 1)
    first_resumed = threads.submit(admission.yield_turn, CallContext(TIMEOUT_S))
    second.result(TIMEOUT_S)

    second_resumed = threads.submit(admission.yield_turn, CallContext(TIMEOUT_S))

    first_resumed.result(TIMEOUT_S)
    assert not second_resumed.done()
    admission.leave(1)
    second_resumed.result(TIMEOUT_S)
    admission.leave(1)
    assert admission.load == IDLE


class _CheckedCall(CallContext):
    """Notes when it is asked whether it is still wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.checks_s: list[float] = []

    def check(self) -> None:
        self.checks_s.append(time.monotonic())
        super().check()


def test_a_call_that_waits_to_go_on_looks_twice_a_second_whether_it_is_wanted(
    threads: ThreadPoolExecutor,
) -> None:
    admission, call = Admission(1, 100, 8), _CheckedCall()
    admission.enter(1, CallContext())
    first = waiting(threads, admission, 1)
    resumed = threads.submit(admission.yield_turn, call)
    first.result(TIMEOUT_S)
    wait_until(lambda: len(call.checks_s) >= 4)
    call.cancel()

    with pytest.raises(CallCancelledError):
        resumed.result(TIMEOUT_S)

    pauses_s = np.diff(call.checks_s)
    assert 0.4 < min(pauses_s) < 1.4
    for _ in range(2):
        admission.leave(1)
    assert admission.load == IDLE


def test_a_call_that_waits_to_go_on_ends_at_its_deadline(threads: ThreadPoolExecutor) -> None:
    admission, call = Admission(1, 100, 8), CallContext(BRIEF_S)
    admission.enter(1, CallContext())
    first = waiting(threads, admission, 1)

    with pytest.raises(DeadlineError):
        admission.yield_turn(call)

    first.result(TIMEOUT_S)
    for _ in range(2):
        admission.leave(1)
    assert admission.load == IDLE


def test_a_call_that_need_not_wait_is_told_that_it_waited_no_time() -> None:
    admission = Admission(2, 100, 0)
    call = CallContext()

    with admission.admit(50, call, lasting_bytes=10), admission.admit(50, call):
        pass
    for _ in range(3):
        with admission.admit(90, call):
            admission.yield_turn(call)

    assert "queue_us=0;" in call.ledger.as_text()
    call.end()
    assert admission.load == IDLE


def test_no_room_is_made_for_a_call_that_fits_beside_what_is_held(
    threads: ThreadPoolExecutor,
) -> None:
    missing: list[int] = []
    admission = Admission(4, 100, 8, make_room=lambda size_bytes, _: missing.append(size_bytes))
    admission.reserve(70)
    admission.enter(10, CallContext())
    exact = waiting(threads, admission, 30)

    admission.leave(10)
    exact.result(TIMEOUT_S)

    assert missing == []
    admission.leave(30)


def test_what_is_held_may_have_all_that_is_free(threads: ThreadPoolExecutor) -> None:
    admission = Admission(4, 100, 8)
    admission.reserve(100)

    for size_bytes in (0, 0):
        admission.reserve(size_bytes)
    with pytest.raises(ExhaustedError, match="0 of 100 are free"):
        admission.reserve(1)
    with pytest.raises(UnavailableError):
        admission.enter(1, CallContext())

    assert admission.load == Load(0, 0, 0, reserved_bytes=100)


def test_calls_that_enter_and_leave_leave_their_peers_share_as_it_was() -> None:
    admission, call = Admission(1, 100, 8), CallContext(TIMEOUT_S)

    for _ in range(200):
        admission.enter(1, call)
        admission.leave(1)

    unread = keep_answer(admission, 20, peer="")
    with pytest.raises(DeadlineError):
        admission.enter(20, CallContext(BRIEF_S), lasting_bytes=20)
    unread.end()
    assert admission.load == IDLE


def come_and_go(admission: Admission, **options: int) -> None:
    with admission.admit(1, CallContext(TIMEOUT_S), **options):
        pass


def enter_and_leave(admission: Admission) -> None:
    admission.enter(1, CallContext(TIMEOUT_S))
    admission.leave(1)


@pytest.mark.parametrize("come", [come_and_go, enter_and_leave])
def test_who_has_brought_nothing_keeps_nobody_from_waiting_who_has_brought_much(
    threads: ThreadPoolExecutor, come: Callable[[Admission], None]
) -> None:
    budget_bytes = 100 << 20
    admission = Admission(1, budget_bytes, 8)
    admission.enter(1, CallContext())
    first = threads.submit(come, admission)
    wait_until(lambda: admission.load.waiting_count == 1)
    second = threads.submit(come_and_go, admission, brought_bytes=budget_bytes // 2)
    wait_until(lambda: admission.load.waiting_count == 2 or second.done())

    admission.leave(1)

    first.result(TIMEOUT_S)
    second.result(TIMEOUT_S)
    assert admission.load == IDLE


def test_a_load_is_a_value() -> None:
    load = Admission(1, 100, 0).load

    assert {load, IDLE} == {IDLE}


def test_the_time_in_which_any_call_runs_is_counted_once(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission = Admission(1, 10, 8)
    clock.now_s = 3
    admission.enter(1, CallContext())
    clock.now_s = 4
    second = waiting(threads, admission, 1)
    assert admission.busy_us == 1_000_000

    admission.leave(1)
    second.result(TIMEOUT_S)
    clock.now_s = 6
    admission.leave(1)
    clock.now_s = 100

    assert admission.busy_us == 3_000_000


def test_a_call_that_runs_beside_another_adds_no_time(clock: StandingClock) -> None:
    admission = Admission(2, 10, 8)
    with admission.admit(1, CallContext()):
        clock.now_s = 1
        with admission.admit(1, CallContext()):
            clock.now_s = 3
        clock.now_s = 4

    assert admission.busy_us == 4_000_000
