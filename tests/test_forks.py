"""Forked children begin anew, and are not forked in the midst of what must not be."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from deconvd.host.forks import ForkBlocker, new_lock, new_reentrant_lock, register_fork_reset
from tests.processes import exit_code

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Owner:
    def __init__(self) -> None:
        self.pids = [os.getpid()]
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        self.pids.append(os.getpid())


def test_owners_begin_anew_in_each_child_and_in_no_other_process() -> None:
    owner = Owner()

    assert exit_code(lambda: owner.pids[1:] == [os.getpid()]) == 0
    assert len(owner.pids) == 1


@pytest.mark.parametrize("new", [new_lock, new_reentrant_lock])
def test_a_lock_that_another_thread_holds_is_free_in_a_child(
    new: Callable[[], threading.Lock | threading.RLock],
) -> None:
    lock, let_go = new(), threading.Event()

    def hold() -> None:
        with lock:
            let_go.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert exit_code(lambda: lock.acquire(timeout=5)) == 0
        assert not lock.acquire(blocking=False)
    finally:
        let_go.set()
        holder.join()


def test_a_fork_waits_for_work_under_way_and_work_for_a_fork() -> None:
    is_under_way = threading.Event()
    is_ended = [False]

    def work() -> None:
        with ForkBlocker():
            is_under_way.set()
            time.sleep(0.2)  # a fork that did not wait would be over before
            is_ended[0] = True

    worker = threading.Thread(target=work)
    worker.start()
    is_under_way.wait(30)
    try:
        assert exit_code(lambda: is_ended[0]) == 0
    finally:
        worker.join()


def test_a_fork_does_not_wait_for_ever_and_its_child_may_do_such_work_itself() -> None:
    let_go = threading.Event()

    def work() -> None:
        with ForkBlocker():
            let_go.wait(60)

    def work_in_child() -> bool:
        with ForkBlocker():
            return exit_code(lambda: True) == 0

    worker = threading.Thread(target=work)
    worker.start()
    begin_s = time.monotonic()
    try:
        assert exit_code(work_in_child) == 0
        assert time.monotonic() - begin_s < 20
    finally:
        let_go.set()
        worker.join()
