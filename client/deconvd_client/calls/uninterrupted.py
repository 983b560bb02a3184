"""Work that no interrupt strikes: it is done in a thread where Python runs no signal handlers.

An exception from a signal handler (KeyboardInterrupt, say) may end a function of the main thread after any call that it
makes, in the middle of what must be whole: between a request and its answer, or with a lock of gRPC's or the standard
library's held (`Condition` is one that stays locked). The main thread waits instead, and leaves if it is interrupted.
"""

from __future__ import annotations

import _thread
import sys
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeAlias, TypeVar, cast

from deconvd.host.forks import register_fork_reset

__all__ = [
    "BackgroundTask",
    "Promise",
    "PromiseTimeoutError",
    "call_uninterrupted",
    "run_in_background",
]

_T = TypeVar("_T")

_WorkQueue: TypeAlias = SimpleQueue[Callable[[], object]]

_IDLE_TIMEOUT_S: Final = 30.0
"""How long a thread that has nothing to do waits for more."""


def call_uninterrupted(work: Callable[[], _T], give_up: Callable[[], object] = lambda: None) -> _T:
    """Return what `work` returns, or raise what it raises, doing it where no interrupt strikes.

    If the caller is interrupted it does not wait: the work goes on by itself.

    Args:
        give_up: Called if the caller is interrupted, in another thread: to end the work soon.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    return BackgroundTask(work).run(give_up)


def run_in_background(work: Callable[[], object]) -> None:
    """Have something done soon in another thread, which does not keep the process alive.

    Unlike `threading.Thread.start` this is whole if an interrupt strikes: the work is done, or not begun.
    It must raise nothing.
    """
    _worker_pool.submit(work)


class PromiseTimeoutError(Exception):
    """What was promised has not been given in time."""


class Promise(Generic[_T]):
    """A value or an error that one thread waits for and another gives, once.

    Unlike a `Future` it does not stay locked if an exception strikes the waiting thread.
    """

    def __init__(self) -> None:
        self._outcome: SimpleQueue[tuple[_T, None] | tuple[None, BaseException]] = SimpleQueue()

    def fulfil(self, value: _T) -> None:
        """Give the value."""
        self._outcome.put((value, None))

    def fail(self, error: BaseException) -> None:
        """Give an error, for the waiting thread to raise."""
        self._outcome.put((None, error))

    def wait(self, within_s: float | None = None) -> _T:
        """Return the value, or raise the error. Raises PromiseTimeoutError if neither comes in time."""
        try:
            value, error = self._outcome.get(timeout=within_s)
        except Empty:
            raise PromiseTimeoutError from None
        if error is None:
            return cast("_T", value)
        try:
            raise error
        finally:
            del error  # it holds this frame


class BackgroundTask(Generic[_T]):
    """Work that is done once, in another thread, and what came of it."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._promise: Promise[_T] = Promise()
        self._has_ended = False

    def run(
        self, give_up: Callable[[], object] = lambda: None, within_s: float | None = None
    ) -> _T:
        """Have it done; return or raise what came of it.

        Args:
            give_up: Called if the caller does not wait for the end, in another thread.
            within_s: How long to wait at most, in seconds; None if the work itself ends in time.

        Raises:
            PromiseTimeoutError: The work has not ended in time.
        """
        try:
            _worker_pool.submit(self._execute)
            return self._promise.wait(within_s)
        except BaseException:
            if not self._has_ended:
                _worker_pool.submit(give_up)
            raise

    def fail(self, error: BaseException) -> None:
        """Let the caller raise an error, and wait no longer. It has no effect once the work has ended."""
        self._promise.fail(error)

    def _execute(self) -> None:
        try:
            value = self._work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            self._has_ended = True
            self._promise.fail(error)
        else:
            self._has_ended = True
            self._promise.fulfil(value)
        del self._work  # a thread that waits for the next must not hold what this one held


class _WorkerPool:
    """Threads that do what the main thread hands them, each one thing at a time.

    The main thread holds no lock here, and waits for none. They do not keep the process alive.
    """

    def __init__(self) -> None:
        self._idle: deque[_WorkQueue] = deque()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        self._idle = deque()

    def submit(self, work: Callable[[], object]) -> None:
        try:
            mailbox = self._idle.pop()
        except IndexError:
            mailbox = SimpleQueue()
            mailbox.put(work)
            # not by `threading`: there the starter waits for the thread, with a lock held
            _thread.start_new_thread(self._serve, (mailbox, self._idle))
        else:
            mailbox.put(work)

    @staticmethod
    def _serve(mailbox: _WorkQueue, idle: deque[_WorkQueue]) -> None:
        # what threads of `threading` do: else debuggers and coverage do not see the work
        if (trace := threading.gettrace()) is not None:
            sys.settrace(trace)
        waits_count = 0
        while waits_count < 2:
            try:
                mailbox.get(
                    timeout=_IDLE_TIMEOUT_S
                )()  # without a name, which would keep it until the next
            except Empty:
                try:
                    idle.remove(mailbox)
                except ValueError:
                    # It was taken, and something is about to be put: wait again, but not for ever, as
                    # an interrupt may have come between.
                    waits_count += 1
                else:
                    return
            else:
                waits_count = 0
                idle.append(mailbox)


_worker_pool: Final = _WorkerPool()
