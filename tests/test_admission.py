"""Admission: calls start in order while places and bytes last, and whatever ends them, nothing leaks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deconvd.errors import CallCancelledError, DeadlineError, ExhaustedError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.device import TURN_S
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.load import Load
from tests.processes import wait_until

TIMEOUT_S = 30
IDLE = Load(running_count=0, waiting_count=0, used_bytes=0)


class Caller:
    """A call in a thread of its own: it asks to be admitted, then stays until it is told to leave.

    Args:
        timeout_s: Of the call; None for no deadline.
    """

    def __init__(
        self, admission: Admission, footprint_bytes: int = 1, timeout_s: float | None = None
    ) -> None:
        self.call = _WatchedCall(timeout_s)
        self.footprint_bytes = footprint_bytes
        self._admission = admission
        self._started, self._leave = threading.Event(), threading.Event()
        self._outcome: Future[None] = Future()
        threading.Thread(target=self._run, daemon=True).start()

    def waits(self) -> bool:
        """Return whether it comes to wait, once it does or has ended or started."""
        assert self.call.settled.wait(TIMEOUT_S)
        return not self._started.is_set() and not self._outcome.done()

    def has_started(self) -> bool:
        """Return whether it has started by now."""
        return self._started.is_set()

    def start(self) -> None:
        """Return once it has started."""
        assert self._started.wait(TIMEOUT_S)

    def end(self) -> None:
        """Let it leave; return once it has left, or raise what it was refused with."""
        self._leave.set()
        self._outcome.result(TIMEOUT_S)

    def _run(self) -> None:
        try:
            with self._admission.admit(self.footprint_bytes, self.call):
                self._started.set()
                self.call.settled.set()
                assert self._leave.wait(TIMEOUT_S)
        except BaseException as error:
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(None)
        self.call.settled.set()


class _CountingCall(CallContext):
    """A call that knows which callbacks wait for its end."""

    def __init__(self) -> None:
        super().__init__()
        self.added_count = 0
        self.callbacks: list[Callable[[], None]] = []

    def on_cancel(self, callback: Callable[[], None]) -> None:
        self.added_count += 1
        self.callbacks.append(callback)
        super().on_cancel(callback)

    def remove_on_cancel(self, callback: Callable[[], None]) -> None:
        self.callbacks.remove(callback)
        super().remove_on_cancel(callback)


class _WatchedCall(CallContext):
    """Tells when it is about to wait: who waits asks for the time left."""

    def __init__(self, timeout_s: float | None) -> None:
        super().__init__(timeout_s)
        self.settled = threading.Event()

    def remaining_s(self) -> float | None:
        self.settled.set()
        return super().remaining_s()


def started(admission: Admission, footprint_bytes: int = 1) -> Caller:
    caller = Caller(admission, footprint_bytes)
    caller.start()
    return caller


def waiting(
    admission: Admission, footprint_bytes: int = 1, timeout_s: float | None = None
) -> Caller:
    caller = Caller(admission, footprint_bytes, timeout_s)
    assert caller.waits()
    return caller


def test_a_call_holds_its_place_and_bytes_and_gives_them_back() -> None:
    admission = Admission(2, 100, 0)

    with admission.admit(60, CallContext()):
        assert admission.load == Load(running_count=1, waiting_count=0, used_bytes=60)

    assert admission.load == IDLE


def test_a_call_that_fails_gives_its_place_and_bytes_back() -> None:
    admission = Admission(1, 100, 0)

    with pytest.raises(KeyError), admission.admit(100, CallContext()):
        raise KeyError

    assert admission.load == IDLE


def test_a_call_waits_for_a_place() -> None:
    admission = Admission(2, 100, 1)
    first, second, third = started(admission), started(admission), waiting(admission)

    second.end()
    third.start()

    assert admission.load == Load(running_count=2, waiting_count=0, used_bytes=2)
    first.end()
    third.end()
    assert admission.load == IDLE


def test_a_call_waits_for_bytes() -> None:
    admission = Admission(9, 100, 1)
    first, second = started(admission, 60), waiting(admission, 41)

    first.end()
    second.start()

    assert admission.load.used_bytes == 41
    second.end()


def test_calls_that_fill_the_budget_to_the_last_byte_run_together() -> None:
    admission = Admission(9, 100, 0)

    callers = [started(admission, size) for size in (60, 40, 0)]

    assert admission.load.used_bytes == 100
    for caller in callers:
        caller.end()


def test_a_small_call_does_not_overtake_a_large_one_that_waits() -> None:
    admission = Admission(9, 100, 4)
    first, large, small = started(admission, 60), waiting(admission, 80), waiting(admission, 30)

    first.end()
    large.start()

    assert not small.has_started()
    large.end()
    small.start()
    small.end()


def test_calls_start_in_the_order_they_came() -> None:
    admission, order = Admission(1, 100, 16), list[int]()
    first = started(admission)
    line = [waiting(admission) for _ in range(8)]

    first.end()
    for number, caller in enumerate(line):
        caller.start()
        order += [n for n, other in enumerate(line) if other.has_started() and n not in order]
        assert order == list(range(number + 1))
        caller.end()


def test_a_call_that_would_never_fit_is_refused_though_the_server_is_idle() -> None:
    admission = Admission(1, 100, 5)

    with pytest.raises(ExhaustedError) as raised, admission.admit(101, CallContext()):
        pass

    assert str(raised.value) == (
        "the call needs 101 bytes of the device's memory, of which calls may take 100: "
        "send fewer samples at a time"
    )
    assert admission.load == IDLE


def test_one_more_than_may_wait_is_refused_at_once_and_told_when_to_come_back() -> None:
    admission = Admission(1, 100, 4)
    first, second, third = started(admission), waiting(admission), waiting(admission)

    with pytest.raises(UnavailableError) as raised, admission.admit(1, CallContext()):
        pass

    assert str(raised.value) == (
        "the server is full: 2 calls wait already, of at most 4, and 2 of them are of the same peer"
    )
    assert raised.value.retry_after_s == 0.5  # nothing was measured yet
    for caller in (first, second, third):
        caller.end()
    assert admission.load == IDLE


def test_no_more_may_wait_either_that_would_fit_beside_those_that_run() -> None:
    admission = Admission(9, 100, 1)
    first, large = started(admission, 60), waiting(admission, 80)

    with pytest.raises(UnavailableError, match="1 calls wait already"):
        admission.enter(30, CallContext(TIMEOUT_S))

    for caller in (first, large):
        caller.end()
    assert admission.load == IDLE


def test_where_none_may_wait_a_call_that_need_not_is_admitted() -> None:
    admission = Admission(1, 100, 0)

    with admission.admit(1, CallContext()):
        refusal = pytest.raises(UnavailableError, match="0 calls wait already")
        with refusal, admission.admit(1, CallContext()):
            pass

    assert admission.load == IDLE


def test_a_call_that_is_refused_leaves_no_callback_behind() -> None:
    admission, call = Admission(1, 100, 0), _CountingCall()

    with admission.admit(1, CallContext()):
        for _ in range(3):
            with pytest.raises(UnavailableError), admission.admit(1, call):
                pass

    assert call.added_count == 3
    assert call.callbacks == []


def test_a_call_whose_deadline_passes_while_it_waits_leaves_the_line() -> None:
    admission = Admission(1, 100, 1)
    first, second = started(admission), Caller(admission, timeout_s=0.01)

    with pytest.raises(DeadlineError):
        second.end()

    assert admission.load == Load(running_count=1, waiting_count=0, used_bytes=1)
    first.end()


@pytest.mark.parametrize("timeout_s", [None, 9.223372036854776e18], ids=["none", "as gRPC has it"])
def test_a_call_without_a_deadline_may_wait(timeout_s: float | None) -> None:
    admission = Admission(1, 100, 1)
    first, second = started(admission), waiting(admission, timeout_s=timeout_s)

    first.end()

    second.start()
    second.end()


def test_a_call_that_is_cancelled_while_it_waits_leaves_the_line() -> None:
    admission = Admission(1, 100, 1)
    first, second = started(admission), waiting(admission)

    second.call.cancel()

    with pytest.raises(CallCancelledError):
        second.end()
    assert admission.load == Load(running_count=1, waiting_count=0, used_bytes=1)
    first.end()


def test_when_the_head_of_the_line_gives_up_those_behind_it_move_up() -> None:
    admission = Admission(9, 100, 4)
    first, large, small = started(admission, 60), waiting(admission, 80), waiting(admission, 30)

    large.call.cancel()
    small.start()

    assert admission.load == Load(running_count=2, waiting_count=0, used_bytes=90)
    with pytest.raises(CallCancelledError):
        large.end()
    first.end()
    small.end()


def test_when_the_deadline_of_the_head_passes_those_behind_it_move_up() -> None:
    admission = Admission(9, 100, 4)
    first, large = started(admission, 60), Caller(admission, 80, timeout_s=0.2)
    large.waits()
    small = Caller(admission, 30)

    small.start()

    with pytest.raises(DeadlineError):
        large.end()
    first.end()
    small.end()
    assert admission.load == IDLE


def test_cancelling_a_call_that_has_started_frees_nothing_before_it_leaves() -> None:
    admission = Admission(1, 100, 0)
    caller = started(admission, 60)

    caller.call.cancel()

    assert admission.load.used_bytes == 60
    caller.end()
    assert admission.load == IDLE


def test_what_is_held_is_not_lent_to_calls() -> None:
    admission = Admission(9, 100, 1)
    admission.reserve(40)
    first, second = started(admission, 30), waiting(admission, 60)
    assert admission.load == Load(1, 1, used_bytes=30, reserved_bytes=40)

    first.end()
    second.start()

    second.end()
    admission.release(40)
    assert admission.load == IDLE


def test_what_is_released_lets_a_call_start() -> None:
    admission = Admission(9, 100, 1)
    admission.reserve(40)
    first, second = started(admission, 30), waiting(admission, 50)

    admission.release(40)
    second.start()

    first.end()
    second.end()
    assert admission.load == IDLE


def test_no_more_is_held_than_is_free() -> None:
    admission = Admission(9, 100, 0)
    admission.reserve(50)

    with admission.admit(30, CallContext()):
        with pytest.raises(ExhaustedError, match=r"21 bytes .* 20 of 100 are free"):
            admission.reserve(21)
        admission.reserve(20)

    assert admission.load == Load(0, 0, 0, reserved_bytes=70)


def test_a_call_that_waits_keeps_its_room() -> None:
    admission = Admission(9, 100, 1)
    first, second = started(admission, 40), waiting(admission, 90)

    with pytest.raises(ExhaustedError, match="10 of 100 are free"):
        admission.reserve(11)
    admission.reserve(10)

    first.end()
    second.start()
    second.end()


def test_a_call_that_what_is_held_leaves_no_room_is_refused_at_once() -> None:
    missing: list[int] = []
    admission = Admission(9, 100, 1, make_room=lambda size_bytes, _: missing.append(size_bytes))
    admission.reserve(70)

    with pytest.raises(UnavailableError, match="have 70 now") as raised:
        with admission.admit(31, CallContext()):
            pass

    assert raised.value.retry_after_s is not None
    assert missing == [1]
    assert admission.load == Load(0, 0, 0, reserved_bytes=70)


def test_room_that_is_made_is_used() -> None:
    admission = Admission(9, 100, 1, make_room=lambda size_bytes, _: admission.release(size_bytes))
    admission.reserve(70)

    with admission.admit(50, CallContext()):
        assert admission.load == Load(1, 0, used_bytes=50, reserved_bytes=50)


def test_many_callers_never_take_more_than_there_is() -> None:
    admission, lock = Admission(3, 100, 1000), threading.Lock()
    running = list[int]()

    def call(size: int) -> None:
        with admission.admit(size, CallContext()):
            with lock:
                running.append(size)
                assert len(running) <= 3
                assert sum(running) <= 100
            with lock:
                running.remove(size)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(call, [1 + 37 * n % 100 for n in range(500)]))

    assert admission.load == IDLE


class AdmissionMachine(RuleBasedStateMachine):
    """Callers come, leave and give up in any order; a list of who runs and one of who waits say what must follow."""

    PLACES, BUDGET_BYTES, WAITING = 3, 10, 3

    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(self.PLACES, self.BUDGET_BYTES, 2 * self.WAITING)
        self.running, self.line = list[Caller](), list[Caller]()
        self.held_bytes = 0

    @rule(footprint_bytes=st.integers(0, 11))
    def come(self, footprint_bytes: int) -> None:
        caller = Caller(self.admission, footprint_bytes)
        caller.waits()
        if footprint_bytes > self.BUDGET_BYTES:
            self._refused(caller, ExhaustedError)
        elif (
            footprint_bytes > self.BUDGET_BYTES - self.held_bytes or len(self.line) == self.WAITING
        ):
            self._refused(caller, UnavailableError)
        else:
            self.line.append(caller)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self._drawn(data, self.running).end()

    @rule(size_bytes=st.integers(0, 10))
    def hold(self, size_bytes: int) -> None:
        room = self.BUDGET_BYTES - self.held_bytes - size_bytes
        if self._used_bytes() <= room and all(c.footprint_bytes <= room for c in self.line):
            self.admission.reserve(size_bytes)
            self.held_bytes += size_bytes
        else:
            with pytest.raises(ExhaustedError):
                self.admission.reserve(size_bytes)

    @precondition(lambda self: self.held_bytes)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        size_bytes = data.draw(st.integers(1, self.held_bytes))
        self.admission.release(size_bytes)
        self.held_bytes -= size_bytes

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        caller = self._drawn(data, self.line)
        caller.call.cancel()
        self._refused(caller, CallCancelledError)

    @invariant()
    def those_at_the_head_who_fit_have_started_and_no_others(self) -> None:
        while self.line and self._fits(self.line[0]):
            self.line[0].start()
            self.running.append(self.line.pop(0))
        assert self.admission.load == Load(
            len(self.running), len(self.line), self._used_bytes(), self.held_bytes
        )
        assert not any(caller.has_started() for caller in self.line)

    def teardown(self) -> None:
        for caller in [*self.running, *self.line]:
            caller.end()
        self.admission.release(self.held_bytes)
        assert self.admission.load == IDLE

    def _fits(self, caller: Caller) -> bool:
        taken_bytes = self._used_bytes() + self.held_bytes
        bytes_fit = taken_bytes + caller.footprint_bytes <= self.BUDGET_BYTES
        return len(self.running) < self.PLACES and bytes_fit

    def _used_bytes(self) -> int:
        return sum(caller.footprint_bytes for caller in self.running)

    @staticmethod
    def _drawn(data: st.DataObject, callers: list[Caller]) -> Caller:
        return callers.pop(data.draw(st.integers(0, len(callers) - 1)))

    @staticmethod
    def _refused(caller: Caller, error: type[Exception]) -> None:
        with pytest.raises(error):
            caller.end()


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=30, stateful_step_count=20)


class TestPassingOn:
    """A call that takes long lets others have its place, and goes on with its bytes."""

    def test_a_call_keeps_its_place_if_nobody_waits(self) -> None:
        admission, call = Admission(1, 100, 1), CallContext()

        with admission.admit(60, call):
            admission.yield_turn(call)
            assert admission.load == Load(running_count=1, waiting_count=0, used_bytes=60)

        assert admission.load == IDLE

    def test_one_that_waits_has_the_place_until_it_leaves(self) -> None:
        admission, call = Admission(1, 100, 9), CallContext()
        with ThreadPoolExecutor(1) as threads, admission.admit(60, call):
            small = waiting(admission, 40)
            passing = threads.submit(admission.yield_turn, call)
            small.start()
            assert admission.load == Load(running_count=1, waiting_count=1, used_bytes=100)
            assert not passing.done()
            small.end()
            passing.result(TIMEOUT_S)
            assert admission.load == Load(running_count=1, waiting_count=0, used_bytes=60)

        assert admission.load == IDLE

    def test_one_that_lacks_bytes_does_not_have_the_place(self) -> None:
        admission, call = Admission(1, 100, 9), CallContext()

        with admission.admit(60, call):
            large = waiting(admission, 41)
            admission.yield_turn(call)
            assert not large.has_started()
        large.start()
        large.end()

        assert admission.load == IDLE

    @pytest.mark.parametrize("places_count", [1, 3])
    def test_calls_that_take_long_and_calls_that_come_do_not_keep_each_other_waiting(
        self, places_count: int
    ) -> None:
        admission, is_over = Admission(places_count, 1000, 1000), threading.Event()
        turns_count, ends_count = [0] * 6, [0] * 6

        def take_long(number: int) -> None:
            call = CallContext()
            with admission.admit(1, call):
                while not is_over.is_set():
                    is_over.wait(TURN_S / 10)
                    turns_count[number] += 1
                    admission.yield_turn(call)

        def come_again(number: int) -> None:
            while not is_over.is_set():
                with admission.admit(1, CallContext()):
                    is_over.wait(TURN_S / 100)
                ends_count[number] += 1

        with ThreadPoolExecutor(12) as threads:
            futures = [threads.submit(take_long, i) for i in range(6)]
            futures += [threads.submit(come_again, i) for i in range(6)]
            wait_until(lambda: min(turns_count) > 2 and min(ends_count) > 10)
            is_over.set()
            for future in futures:
                future.result()

        assert admission.load == IDLE

    def test_one_that_is_cancelled_long_before_its_deadline_ends_soon(self) -> None:
        admission, call = Admission(1, 100, 9), CallContext(timeout_s=60)
        with ThreadPoolExecutor(1) as threads:
            admission.enter(60, call)
            small = waiting(admission, 40)
            passing = threads.submit(admission.yield_turn, call)
            small.start()
            call.cancel()
            with pytest.raises(CallCancelledError):
                passing.result(TIMEOUT_S)
            admission.leave(60)
            small.end()

        assert admission.load == IDLE

    def test_a_call_that_ends_meanwhile_gives_back_what_it_has(self) -> None:
        admission = Admission(1, 100, 9)
        for call, error in (
            (CallContext(), CallCancelledError),
            (CallContext(timeout_s=0.2), DeadlineError),
        ):
            admission.enter(60, call)
            small = waiting(admission, 40)
            if error is CallCancelledError:
                threading.Timer(0.1, call.cancel).start()
            with pytest.raises(error):
                admission.yield_turn(call)
            admission.leave(60)
            small.end()
            assert admission.load == IDLE

    def test_a_call_of_many_slices_leaves_nothing_behind_where_it_waited(self) -> None:
        admission, call = Admission(1, 100, 9), CallContext()
        for _ in range(3):
            first = started(admission)
            with ThreadPoolExecutor(1) as threads:
                entered = threads.submit(admission.enter, 1, call)
                wait_until(lambda: admission.load.waiting_count == 1)
                first.end()
                entered.result(TIMEOUT_S)
            admission.leave(1)

        assert call._callbacks == []
