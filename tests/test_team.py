"""The team: tasks are done once each, by the caller and its helpers in turns, and an error stops the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deconvd_server.device import TURN_S
from deconvd_server.device.cpu.team import Task, Team
from tests.processes import wait_until

TIMEOUT_S = 30
SLICE_S = 0.02


def in_one_step(task: Callable[[Any], object], argument: Any) -> Task:
    task(argument)
    yield


def do_all(team: Team, task: Callable[[int], object], numbers: Iterable[int]) -> None:
    """Have a team call a function with each of some numbers."""
    numbers = list(numbers)
    team.run((in_one_step(task, number) for number in numbers), len(numbers))


@pytest.fixture
def pair() -> Iterator[Team]:
    """A team of the caller and one helper."""
    team = Team(2)
    yield team
    team.close()


@pytest.mark.parametrize("threads_count", [1, 2, 5])
@pytest.mark.parametrize("tasks_count", [0, 1, 2, 100])
def test_every_task_is_done_once(threads_count: int, tasks_count: int) -> None:
    team, done = Team(threads_count), list[int]()

    do_all(team, done.append, range(tasks_count))
    team.close()

    assert sorted(done) == [*range(tasks_count)]


def test_tasks_are_shared_with_the_helpers(pair: Team) -> None:
    meeting = threading.Barrier(2)

    def meet(_: int) -> None:
        meeting.wait(TIMEOUT_S)  # raises unless a second thread comes

    do_all(pair, meet, range(2))

    assert not meeting.broken


def test_a_team_of_one_works_in_the_callers_thread_alone() -> None:
    team, threads = Team(1), set[threading.Thread]()

    do_all(team, lambda _: threads.add(threading.current_thread()), range(10))
    team.close()

    assert threads == {threading.current_thread()}


def test_a_call_makes_progress_while_the_helpers_are_busy_with_another(pair: Team) -> None:
    both_busy, finish, done = threading.Barrier(3), threading.Event(), list[int]()

    def hold(_: int) -> None:
        both_busy.wait(TIMEOUT_S)
        assert finish.wait(TIMEOUT_S)

    with ThreadPoolExecutor(1) as callers:
        large = callers.submit(do_all, pair, hold, range(2))
        both_busy.wait(TIMEOUT_S)
        do_all(pair, done.append, range(5))
        assert not large.done()
        finish.set()
        large.result(TIMEOUT_S)

    assert done == [0, 1, 2, 3, 4]


def test_an_error_is_raised_and_no_further_task_is_begun() -> None:
    team, begun = Team(1), list[int]()

    def fail(number: int) -> None:
        begun.append(number)
        if number == 2:
            raise KeyError(number)

    with pytest.raises(KeyError, match="2"):
        do_all(team, fail, range(100))
    team.close()

    assert begun == [0, 1, 2]


def test_after_an_error_the_helpers_take_no_further_step_either(pair: Team) -> None:
    both_begun, begun = threading.Barrier(2), list[str]()

    def fail(_: None) -> None:
        both_begun.wait(TIMEOUT_S)
        raise KeyError

    def going_on() -> Task:
        both_begun.wait(TIMEOUT_S)
        (batch,) = pair._batches
        wait_until(lambda: batch.is_dropped)  # the other has failed
        yield
        begun.append("the next step")

    tasks = [in_one_step(fail, None), going_on(), in_one_step(begun.append, "the third task")]
    with pytest.raises(KeyError):
        pair.run(iter(tasks), len(tasks))

    assert begun == []


def test_an_error_in_a_helper_is_raised_to_the_caller(pair: Team) -> None:
    caller, both_begun = threading.current_thread(), threading.Barrier(2)

    def fail_in_helper(_: int) -> None:
        both_begun.wait(TIMEOUT_S)
        if threading.current_thread() is not caller:
            raise ValueError("in a helper")

    with pytest.raises(ValueError, match="in a helper"):
        do_all(pair, fail_in_helper, range(2))


def test_an_error_is_raised_only_once_the_tasks_under_way_have_ended(pair: Team) -> None:
    caller, both_begun, failed = threading.current_thread(), threading.Barrier(2), threading.Event()
    ended = list[str]()

    def task(_: int) -> None:
        both_begun.wait(TIMEOUT_S)
        if threading.current_thread() is caller:
            failed.set()
            raise ValueError("failed first")
        assert failed.wait(TIMEOUT_S)
        ended.append("helper")

    with pytest.raises(ValueError, match="failed first"):
        do_all(pair, task, range(2))

    assert ended == ["helper"]


def test_a_team_works_on_after_an_error(pair: Team) -> None:
    def fail(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        do_all(pair, fail, range(10))

    done = list[int]()
    do_all(pair, done.append, range(10))

    assert sorted(done) == list(range(10))


def test_many_callers_each_get_their_own_tasks_done(pair: Team) -> None:
    def call(caller: int) -> list[tuple[int, int]]:
        done = list[tuple[int, int]]()
        do_all(pair, lambda number: done.append((caller, number)), range(50))
        return sorted(done)

    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(call, range(8)))

    assert results == [[(caller, number) for number in range(50)] for caller in range(8)]


def test_helpers_work_on_the_tasks_of_all_calls_in_turn(pair: Team) -> None:
    """A long task does not keep the helper from another call's: each is put back after a slice."""
    ended, met = threading.Event(), threading.Barrier(2)

    def long() -> Task:
        while not ended.is_set():
            time.sleep(0.001)
            yield

    with ThreadPoolExecutor(1) as callers:
        large = callers.submit(pair.run, iter([long(), long(), long()]), 3)
        try:
            # two tasks that need two threads at once: its caller's own, and the helper
            do_all(pair, lambda _: met.wait(TIMEOUT_S), range(2))
            assert not large.done()
        finally:
            ended.set()
        large.result(TIMEOUT_S)


def test_a_call_pauses_after_each_turn_and_no_step_is_begun_meanwhile(pair: Team) -> None:
    steps, pauses = list[float](), list[float]()
    begin_s = time.monotonic()

    def task() -> Task:
        while len(pauses) < 3:
            steps.append(time.monotonic())
            time.sleep(0.001)
            yield

    def are_over() -> bool:  # once the helper has ended its slice
        before = len(steps)
        time.sleep(2 * SLICE_S)
        return len(steps) == before

    def pause() -> None:
        at_s = time.monotonic() - begin_s
        wait_until(are_over)
        pauses.append(at_s)

    pair.run(iter([task(), task()]), 2, pause)

    assert [i for i, at_s in enumerate(pauses, 1) if at_s < i * TURN_S] == []


def test_a_task_that_is_put_back_is_done_to_its_end(pair: Team) -> None:
    done = list[int]()

    def task(number: int) -> Task:
        for _ in range(5):
            time.sleep(0.01)
            yield
        done.append(number)

    pair.run((task(i) for i in range(4)), 4)

    assert sorted(done) == [0, 1, 2, 3]


def test_an_error_of_the_pause_ends_the_call(pair: Team) -> None:
    def task() -> Task:
        while True:
            time.sleep(0.001)
            yield

    def pause() -> None:
        raise ValueError("given up")

    with pytest.raises(ValueError, match="given up"):
        pair.run(iter([task(), task()]), 2, pause)

    done = list[int]()
    do_all(pair, done.append, range(3))
    assert sorted(done) == [0, 1, 2]


def test_close_ends_the_helpers() -> None:
    team, meeting, helpers = Team(3), threading.Barrier(3), set[threading.Thread]()

    def note(_: int) -> None:
        meeting.wait(TIMEOUT_S)
        helpers.add(threading.current_thread())

    do_all(team, note, range(3))
    team.close()

    assert len(helpers) == 3
    assert {thread for thread in helpers if thread.is_alive()} == {threading.current_thread()}
