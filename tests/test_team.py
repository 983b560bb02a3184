"""The team: tasks are done once each, by the caller and its helpers, and an error stops the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from deconvd_server.device.cpu.team import Team

TIMEOUT_S = 30


@pytest.fixture
def pair() -> Iterator[Team]:
    """A team of the caller and one helper."""
    team = Team(2)
    yield team
    team.close()


@pytest.mark.parametrize("threads_count", [1, 2, 5])
@pytest.mark.parametrize("tasks_count", [0, 1, 2, 100])
def test_every_task_is_done_once(threads_count: int, tasks_count: int) -> None:
    team, done = Team(threads_count), list[tuple[int, str]]()

    team.run(
        lambda number, word: done.append((number, word)), [(i, "w") for i in range(tasks_count)]
    )
    team.close()

    assert sorted(done) == [(i, "w") for i in range(tasks_count)]


def test_tasks_are_shared_with_the_helpers(pair: Team) -> None:
    meeting = threading.Barrier(2)

    def meet(_: int) -> None:
        meeting.wait(TIMEOUT_S)  # raises unless a second thread comes

    pair.run(meet, [(0,), (1,)])

    assert not meeting.broken


def test_a_team_of_one_works_in_the_callers_thread_alone() -> None:
    team, threads = Team(1), set[threading.Thread]()

    team.run(lambda _: threads.add(threading.current_thread()), [(i,) for i in range(10)])
    team.close()

    assert threads == {threading.current_thread()}


def test_a_call_makes_progress_while_the_helpers_are_busy_with_another(pair: Team) -> None:
    both_busy, finish, done = threading.Barrier(3), threading.Event(), list[int]()

    def hold(_: int) -> None:
        both_busy.wait(TIMEOUT_S)
        assert finish.wait(TIMEOUT_S)

    with ThreadPoolExecutor(1) as callers:
        large = callers.submit(pair.run, hold, [(0,), (1,)])
        both_busy.wait(TIMEOUT_S)
        pair.run(done.append, [(i,) for i in range(5)])
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
        team.run(fail, [(i,) for i in range(100)])
    team.close()

    assert begun == [0, 1, 2]


def test_after_an_error_the_helpers_begin_no_further_task_either(pair: Team) -> None:
    caller, both_begun, dropped = (
        threading.current_thread(),
        threading.Barrier(2),
        threading.Event(),
    )

    class Argument:
        """Tells when the team has let go of it."""

        def __del__(self) -> None:
            dropped.set()

    seen = list[bool]()

    def task(_: object) -> None:
        both_begun.wait(TIMEOUT_S)
        if threading.current_thread() is caller:
            raise KeyError
        seen.append(dropped.wait(5))

    with pytest.raises(KeyError):
        pair.run(task, ((rest,) for rest in ("first", "second", Argument())))

    assert seen == [True]  # the third task was dropped while the helper was at the second


def test_an_error_in_a_helper_is_raised_to_the_caller(pair: Team) -> None:
    caller, both_begun = threading.current_thread(), threading.Barrier(2)

    def fail_in_helper(_: int) -> None:
        both_begun.wait(TIMEOUT_S)
        if threading.current_thread() is not caller:
            raise ValueError("in a helper")

    with pytest.raises(ValueError, match="in a helper"):
        pair.run(fail_in_helper, [(0,), (1,)])


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
        pair.run(task, [(0,), (1,)])

    assert ended == ["helper"]


def test_a_team_works_on_after_an_error(pair: Team) -> None:
    def fail(_: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pair.run(fail, [(i,) for i in range(10)])

    done = list[int]()
    pair.run(done.append, [(i,) for i in range(10)])

    assert sorted(done) == list(range(10))


def test_many_callers_each_get_their_own_tasks_done(pair: Team) -> None:
    def call(caller: int) -> list[tuple[int, int]]:
        done = list[tuple[int, int]]()
        pair.run(lambda number: done.append((caller, number)), [(i,) for i in range(50)])
        return sorted(done)

    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(call, range(8)))

    assert results == [[(caller, number) for number in range(50)] for caller in range(8)]


def test_close_ends_the_helpers() -> None:
    team, meeting, helpers = Team(3), threading.Barrier(3), set[threading.Thread]()

    def note(_: int) -> None:
        meeting.wait(TIMEOUT_S)
        helpers.add(threading.current_thread())

    team.run(note, [(i,) for i in range(3)])
    team.close()

    assert len(helpers) == 3
    assert {thread for thread in helpers if thread.is_alive()} == {threading.current_thread()}
