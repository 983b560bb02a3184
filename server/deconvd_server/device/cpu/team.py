"""A team of threads that share the tasks of calls.

    caller    works on the tasks of its own call; after each turn, `TURN_S`, lets another call have its place (`pause`)
    helper    works on the tasks of all calls in turn, for a slice, `_SLICE_S`, of each

Two calls and one helper:

    caller A    A0 A0 A1 A1 | pause: another call has A's place     | A2 A2 ...
    caller B    B0 B0 B0 B1 B1 B1 ...
    helper      A3 B2 A3 B2 | B2 B3 B2: A has withdrawn its tasks   | A3 B3 ...

A task is done in steps of some ten milliseconds. After a slice a thread puts its task back, and the thread that takes
it next continues it. So no call keeps a thread from the other calls for longer than a slice and a step.
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
"""A task. Each `next` does one step of it."""

_SLICE_S: Final = 0.02
"""How long a thread works on a task before it takes another one. That is much longer than taking one costs."""


class _TaskBatch:
    """The tasks of one caller. Every access must be under the team's lock, but for reads of `is_dropped`.

        not started --take--> running --put_back--> paused --take--> running
                                      --finish_turn--> done

    Attributes:
        running_count: Threads that work on the tasks now.
        is_dropped: Whether no further step may be started.
        error: The error of the first task that failed.
        changed: Notified when a thread has stopped working on a task.
    """

    __slots__ = ("_not_started", "_paused", "changed", "error", "is_dropped", "running_count")

    def __init__(self, tasks: Iterator[Task], lock: threading.Lock) -> None:
        self._not_started = tasks
        self._paused: deque[Task] = deque()
        self.is_dropped = False
        self.running_count = 0
        self.error: BaseException | None = None
        self.changed = threading.Condition(lock)

    def take(self) -> Task | None:
        """Return a task, to work on until `put_back` or `finish_turn`; None if all tasks are running or done."""
        task = self._paused.popleft() if self._paused else next(self._not_started, None)
        if task is not None:
            self.running_count += 1
        return task

    def put_back(self, task: Task) -> None:
        """Let another thread continue a task."""
        if not self.is_dropped:
            self._paused.append(task)
        self.finish_turn()

    def finish_turn(self) -> None:
        """Note that the thread no longer works on its task."""
        self.running_count -= 1
        self.changed.notify()

    def drop(self) -> None:
        """Let no further step start. The tasks, and the arrays that they hold, are released here."""
        self.is_dropped = True
        self._not_started = iter(())
        self._paused.clear()


class Team:
    """Helper threads that do independent tasks together with the calling threads.

    The caller works too, so its call makes progress while all helpers are busy with other calls.

    Args:
        threads_count: The most threads that work for one caller, its own included.
        begin: Called in each helper when it starts.
    """

    def __init__(self, threads_count: int, begin: Callable[[], object] = lambda: None) -> None:
        self.threads_count = threads_count
        self._begin = begin
        self._lock = threading.Lock()
        self._work_available = threading.Condition(self._lock)
        self._batches: deque[_TaskBatch] = deque()  # helpers work on these, in turn
        self._is_closed = False
        # All are started here: if the system refuses a thread, the server must not start to serve.
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
        """Do tasks. Return when all are done.

        If a task raises, no further step is started, and the error is raised once the running steps have ended.

        Args:
            tasks_count: The most tasks that the iterator has.
            pause: Called in this thread after each turn. It may take long. Meanwhile no thread takes one of the tasks.
        """
        batch = _TaskBatch(tasks, self._lock)
        helpers_count = min(tasks_count - 1, len(self._helpers))
        self._offer(batch, helpers_count)
        try:
            self._work(batch, helpers_count, pause)
        finally:
            self._end(batch)
        # The error's traceback holds this frame. If the frame held the error too, the call's arrays would stay
        # until the garbage collector finds the circle.
        error, batch.error = batch.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error

    def close(self) -> None:
        """End the helpers. No `run` may be under way."""
        with self._lock:
            self._is_closed = True
            self._work_available.notify_all()
        for helper in self._helpers:
            helper.join()

    def _offer(self, batch: _TaskBatch, helpers_count: int) -> None:
        """Let helpers work on a batch."""
        if helpers_count > 0:
            with self._lock:
                self._batches.append(batch)
                self._work_available.notify(helpers_count)

    def _withdraw(self, batch: _TaskBatch) -> None:
        with self._lock:
            if batch in self._batches:
                self._batches.remove(batch)

    def _work(self, batch: _TaskBatch, helpers_count: int, pause: Callable[[], None]) -> None:
        """Work on a batch until no task is left, in turns."""
        turn_ends_s = time.monotonic() + TURN_S
        while True:
            with self._lock:
                task = batch.take()
                if task is None:
                    if not batch.running_count:
                        return
                    batch.changed.wait()  # a helper may put a task back, which this thread then continues
            if task is not None:
                self._do(batch, task)
            if time.monotonic() >= turn_ends_s:
                # The pause gives this call's place away, so helpers must not go on to compute for it.
                self._withdraw(batch)
                pause()
                self._offer(batch, helpers_count)
                turn_ends_s = time.monotonic() + TURN_S

    def _end(self, batch: _TaskBatch) -> None:
        """Return once no thread works on a batch, and none will: the caller's arrays are its own again."""
        self._withdraw(batch)
        with self._lock:
            batch.drop()
            while batch.running_count:
                batch.changed.wait()

    def _help(self) -> None:
        self._begin()
        while self._help_next():
            pass

    def _help_next(self) -> bool:
        """Work for a slice on a task of the batch whose turn it is. Return False once the team is closed.

        A function of its own, so that while a helper waits for work no local variable of its keeps a call's arrays.
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
        for _ in range(len(self._batches)):
            batch = self._batches[0]
            self._batches.rotate(-1)
            task = batch.take()
            if task is not None:
                return batch, task
        return None

    def _do(self, batch: _TaskBatch, task: Task) -> None:
        """Work on a task for a slice."""
        try:
            is_done = _advance(batch, task)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            with self._lock:
                batch.error = batch.error or error
                batch.drop()
                batch.finish_turn()
            return
        with self._lock:
            if is_done:
                batch.finish_turn()
            else:
                batch.put_back(task)
                self._work_available.notify()


def _advance(batch: _TaskBatch, task: Task) -> bool:
    """Do steps of a task for a slice, or until its batch is dropped. Return whether all its steps are done."""
    until_s = time.monotonic() + _SLICE_S
    return all(not batch.is_dropped and time.monotonic() < until_s for _ in task)
