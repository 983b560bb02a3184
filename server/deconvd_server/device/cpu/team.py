"""Threads that share the tasks of calls, and are shared by calls.

    caller   works on the tasks of its own call, and now and then lets another call have its place (`pause`)
    helper   works on the tasks of all calls in turn

A task is done in steps of some ten milliseconds. Whoever has worked on one for a while puts it back, and whoever takes
it next goes on with it: no call keeps a thread from the others for longer.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from deconvd_server.device.protocol import TURN_S

__all__ = ["Task", "Team"]

Task: TypeAlias = Iterator[None]
"""A task: doing its next step is to ask for the next item."""

_SLICE_S: Final = 0.02
"""How long a thread works on a task before it looks for those of others: much more than it takes to look."""


class _TaskBatch:
    """The tasks of one caller. All of it is under the team's lock.

    Attributes:
        running_count: How many threads work on them now.
        is_dropped: Whether no further step is to be begun.
        error: What the first task that failed has raised.
        changed: Notified when a thread has stopped working on a task.
    """

    __slots__ = ("_paused", "_tasks", "changed", "error", "is_dropped", "running_count")

    def __init__(self, tasks: Iterator[Task], lock: threading.Lock) -> None:
        self._tasks = tasks
        self._paused: deque[Task] = deque()
        self.is_dropped = False
        self.running_count = 0
        self.error: BaseException | None = None
        self.changed = threading.Condition(lock)

    def take(self) -> Task | None:
        """Return a task to work on until `put_back` or `note_end`; None if there is none now."""
        steps = self._paused.popleft() if self._paused else next(self._tasks, None)
        if steps is not None:
            self.running_count += 1
        return steps

    def put_back(self, steps: Task) -> None:
        """Let others go on with a task."""
        if not self.is_dropped:
            self._paused.append(steps)
        self.finish_turn()

    def finish_turn(self) -> None:
        """Note that a thread works on a task no longer."""
        self.running_count -= 1
        self.changed.notify()

    def drop(self) -> None:
        """Have nothing more begun."""
        self.is_dropped = True
        self._tasks = iter(())
        self._paused.clear()


class Team:
    """A calling thread and its helpers, who do tasks that are independent of each other.

    The caller works too, so a call makes progress while the helpers are busy with others.

    Args:
        threads_count: How many threads work for one caller at most, the caller's own counted.
        begin: Called in each helper, as it begins.
    """

    def __init__(self, threads_count: int, begin: Callable[[], object] = lambda: None) -> None:
        self.threads_count = threads_count
        self._begin = begin
        self._lock = threading.Lock()
        self._work_available = threading.Condition(self._lock)
        self._jobs: deque[_TaskBatch] = deque()  # those that helpers work on, in turn
        self._is_closed = False
        # all at once: a thread that cannot be started is to be known before there are calls
        self._helpers = [
            threading.Thread(target=self._help, name=f"cpu {i}", daemon=True)
            for i in range(threads_count - 1)
        ]
        for helper in self._helpers:
            helper.start()

    def run(
        self,
        tasks: Iterator[Task],
        tasks_count: int,
        pause: Callable[[], None] = lambda: None,
    ) -> None:
        """Do tasks, and return when all have been done.

        If a task raises, no further step is begun, and the error is raised once those under way have ended.

        Args:
            tasks_count: How many there are at most.
            pause: Called in this thread after each turn, while nobody begins a step: may take long.
        """
        job = _TaskBatch(tasks, self._lock)
        helpers_count = min(tasks_count - 1, len(self._helpers))
        self._offer(job, helpers_count)
        try:
            self._work(job, helpers_count, pause)
        finally:
            self._end(job)
        # An error holds this frame. It must not hold the error, or the call's arrays would stay until
        # the garbage collector finds the two.
        error, job.error = job.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def close(self) -> None:
        """End the helpers. No call may be under way."""
        with self._lock:
            self._is_closed = True
            self._work_available.notify_all()
        for helper in self._helpers:
            helper.join()

    def _offer(self, job: _TaskBatch, helpers_count: int) -> None:
        """Let helpers work on a job."""
        if helpers_count > 0:
            with self._lock:
                self._jobs.append(job)
                self._work_available.notify(helpers_count)

    def _withdraw(self, job: _TaskBatch) -> None:
        with self._lock:
            if job in self._jobs:
                self._jobs.remove(job)

    def _work(self, job: _TaskBatch, helpers_count: int, pause: Callable[[], None]) -> None:
        """Work on a job until no task is left, in turns."""
        turn_ends_s = time.monotonic() + TURN_S
        while True:
            with self._lock:
                steps = job.take()
                if steps is None:
                    if not job.running_count:
                        return
                    job.changed.wait()  # a task may be put back
            if steps is not None:
                self._do(job, steps)
            if time.monotonic() >= turn_ends_s:
                self._withdraw(job)
                pause()
                self._offer(job, helpers_count)
                turn_ends_s = time.monotonic() + TURN_S

    def _end(self, job: _TaskBatch) -> None:
        """Return once nobody works on a job, and nobody will."""
        self._withdraw(job)
        with self._lock:
            job.drop()
            while job.running_count:
                job.changed.wait()

    def _help(self) -> None:
        self._begin()
        while self._help_next():
            pass

    def _help_next(self) -> bool:
        """Work for a while on a task of the job whose turn it is; return False once the team is closed.

        When it returns it holds nothing of a call's.
        """
        with self._lock:
            taken = self._take_in_turn()
            while taken is None and not self._is_closed:
                self._work_available.wait()
                taken = self._take_in_turn()
        if taken is None:
            return False
        self._do(*taken)
        return True

    def _take_in_turn(self) -> tuple[_TaskBatch, Task] | None:
        for _ in range(len(self._jobs)):
            job = self._jobs[0]
            self._jobs.rotate(-1)
            steps = job.take()
            if steps is not None:
                return job, steps
        return None

    def _do(self, job: _TaskBatch, steps: Task) -> None:
        """Work on a task for a while."""
        try:
            is_over = _advance(job, steps)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            with self._lock:
                job.error = job.error or error
                job.drop()
                job.finish_turn()
            return
        with self._lock:
            if is_over:
                job.finish_turn()
            else:
                job.put_back(steps)
                self._work_available.notify()


def _advance(job: _TaskBatch, steps: Task) -> bool:
    """Do steps of a task for a while, or until its job is dropped; return whether all are done."""
    until_s = time.monotonic() + _SLICE_S
    return all(not job.is_dropped and time.monotonic() < until_s for _ in steps)
