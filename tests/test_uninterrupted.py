"""Work that goes on where no interrupt strikes, while its caller may be interrupted at any moment."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from functools import partial
from types import FrameType

import numpy as np
import numpy.typing as npt
import pytest

from deconvd_client.calls.uninterrupted import (
    BackgroundTask,
    Promise,
    PromiseTimeoutError,
    call_uninterrupted,
)
from tests.interrupts import InterruptOutcome, interrupt_at_random, interrupt_everywhere
from tests.processes import exit_code, wait_until


def test_work_is_done_in_another_thread_and_its_outcome_is_the_callers() -> None:
    caller = threading.get_ident()
    assert call_uninterrupted(threading.get_ident) != caller
    with pytest.raises(ZeroDivisionError):
        call_uninterrupted(lambda: 1 // 0)


def test_a_thread_that_no_signal_interrupts_does_its_work_itself() -> None:
    idents: list[bool] = []

    def work() -> None:
        idents.append(call_uninterrupted(threading.get_ident) == threading.get_ident())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()

    assert idents == [True]


def test_a_caller_that_is_interrupted_leaves_at_once_and_has_the_work_given_up() -> None:
    given_up, ended = threading.Event(), threading.Event()

    def work() -> None:
        given_up.wait(30)
        ended.set()

    begin_s = time.monotonic()
    outcome = interrupt_at_random(
        lambda: call_uninterrupted(work, given_up.set), random.Random(0), 0.01
    )
    assert outcome is InterruptOutcome.RAISED
    assert time.monotonic() - begin_s < 20

    assert given_up.wait(30)
    assert ended.wait(30)


def test_nobody_holds_what_work_has_used() -> None:
    array = np.ones(10)
    alive = weakref.ref(array)

    def work(array: npt.NDArray[np.float64] = array) -> float:
        return float(array.sum())

    assert call_uninterrupted(work) == 10
    del array, work

    wait_until(lambda: alive() is None)


def test_each_caller_gets_its_own_outcome_wherever_an_interrupt_strikes() -> None:
    done: list[int] = []
    for number, _ in enumerate(interrupt_everywhere(lambda: call_uninterrupted(int))):
        assert call_uninterrupted(partial(int, number)) == number
        done.append(number)
    assert len(done) > 10


@pytest.mark.parametrize("strikes_count", [1, 2])
def test_each_caller_gets_its_own_outcome_whenever_interrupts_strike(strikes_count: int) -> None:
    chance = random.Random(strikes_count)
    struck_count = 0
    for number in range(2000):

        def work(number: int = number) -> None:
            for _ in range(10):
                assert call_uninterrupted(lambda: number) == number

        outcome = interrupt_at_random(work, chance, 0.0002, strikes_count=strikes_count)
        assert outcome is not InterruptOutcome.LOST
        struck_count += outcome is InterruptOutcome.RAISED
    assert struck_count > 100
    assert threading.active_count() < 100


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    call_uninterrupted(time.monotonic)

    assert exit_code(lambda: call_uninterrupted(lambda: True)) == 0


def test_a_signal_that_does_not_wake_the_waiting_thread_is_handled_soon() -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise InterruptedError

    is_waiting = threading.Event()

    def wait() -> None:
        is_waiting.set()
        Promise[None]().wait(30)

    def send_to_itself() -> None:
        is_waiting.wait(30)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, interrupt)
    sender = threading.Thread(target=send_to_itself)
    sender.start()
    begin_s = time.monotonic()
    try:
        with pytest.raises(InterruptedError):
            wait()
        assert time.monotonic() - begin_s < 20
    finally:
        signal.signal(signal.SIGUSR1, before)
        sender.join()


def test_work_that_takes_too_long_is_not_waited_for() -> None:
    let_go = threading.Event()
    with pytest.raises(PromiseTimeoutError):
        BackgroundTask(lambda: let_go.wait(30)).run(let_go.set, within_s=0.1)
    assert let_go.wait(30)


def test_who_waits_can_be_told_to_raise_an_error() -> None:
    let_go = threading.Event()
    job = BackgroundTask(lambda: let_go.wait(30))
    threading.Timer(0.05, job.fail, [ValueError("no more")]).start()
    with pytest.raises(ValueError, match="no more"):
        job.run(let_go.set)
    assert let_go.wait(30)


def test_work_that_was_started_is_waited_for_later() -> None:
    let_go = threading.Event()
    waiting: BackgroundTask[bool] = BackgroundTask(lambda: let_go.wait(30))
    failing: BackgroundTask[float] = BackgroundTask(lambda: 1 / 0)
    for task in (waiting, failing):
        task.start()
    with pytest.raises(ZeroDivisionError):
        failing.wait()
    with pytest.raises(PromiseTimeoutError):
        waiting.wait(0.05)
    let_go.set()
    assert waiting.wait(30)


def test_debuggers_see_the_work_as_in_other_threads() -> None:
    script = (
        "import threading\n"
        "from deconvd_client.calls.uninterrupted import call_uninterrupted\n"
        "threading.settrace(lambda frame, *_: print(frame.f_code.co_name))\n"
        "def work(): pass\n"
        "call_uninterrupted(work)\n"
    )

    shown = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=True
    )

    assert "work" in shown.stdout.split()
