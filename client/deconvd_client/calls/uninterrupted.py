"""Work that no interrupt can break off: it is done in a background thread.

Python runs signal handlers in the main thread alone. An exception from one (KeyboardInterrupt, say) may leave a
function of the main thread after any call that it makes, also in the middle of an operation that must not be split:
between a request and its reply, or with a lock of gRPC or of the standard library held (`Condition` is one that stays
locked). With the work in another thread, the main thread only waits for it, and can leave at any time.
"""

from __future__ import annotations

import _thread
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final, Generic, TypeAlias, TypeVar, cast

from deconvd.host.forks import register_fork_reset
from deconvd_client.calls.cancel_scope import CancelScope, fail_on_cancel

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
"""How long an idle thread waits for more work."""

_SIGNAL_CHECK_INTERVAL_S: Final = 0.2
"""How long a thread waits without a look for signals.

A signal can arrive after Python's last look and before the thread sleeps, or in another thread. It does not wake the
sleeping thread then, so its handler would run only after the wait.
"""


def call_uninterrupted(
    work: Callable[[], _T],
    give_up: Callable[[], object] = lambda: None,
    scope: CancelScope | None = None,
) -> _T:
    """Return what `work` returns, or raise what it raises. In the main thread, a background thread does the work.

    If the caller is interrupted or cancelled it stops waiting, and the work goes on.

    Args:
        give_up: Called in another thread if the caller stops waiting. It should make the work end soon.
        scope: Who can cancel the caller. Then a background thread does the work in any case.
    """
    if scope is None and threading.current_thread() is not threading.main_thread():
        return work()
    return BackgroundTask(work).run(give_up, scope=scope)


def run_in_background(work: Callable[[], object]) -> None:
    """Have work done soon in another thread, which does not keep the process alive.

    Unlike `threading.Thread.start` this is atomic: if an interrupt strikes, the work is either done or never begun. The
    work must not raise an exception.
    """
    _worker_pool.submit(work)


class PromiseTimeoutError(Exception):
    """A promise was not fulfilled in time."""


class Promise(Generic[_T]):
    """A value or an error that one thread waits for and another gives, once.

    Unlike a `Future` it cannot stay locked if an exception from a signal handler strikes the waiting thread.
    """

    def __init__(self) -> None:
        self._outcome: SimpleQueue[tuple[_T, None] | tuple[None, BaseException]] = SimpleQueue()

    def fulfil(self, value: _T) -> None:
        """Give the value."""
        self._outcome.put((value, None))

    def fail(self, error: BaseException) -> None:
        """Give an error, for the waiting thread to raise."""
        self._outcome.put((None, error))

    def wait(self, within_s: float = math.inf) -> _T:
        """Return the value, or raise the error. Raises PromiseTimeoutError if there is neither in time."""
        end_s = time.monotonic() + within_s
        while True:
            wait_s = min(end_s - time.monotonic(), _SIGNAL_CHECK_INTERVAL_S)
            try:
                value, error = self._outcome.get(timeout=max(wait_s, 0.0))
                break
            except Empty:
                if time.monotonic() >= end_s:
                    raise PromiseTimeoutError from None
        if error is None:
            return cast("_T", value)
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame: a cycle


class BackgroundTask(Generic[_T]):
    """Work that another thread does, once, and its outcome."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self._work = work
        self._promise: Promise[_T] = Promise()
        self._has_ended = False

    def run(
        self,
        give_up: Callable[[], object] = lambda: None,
        within_s: float = math.inf,
        scope: CancelScope | None = None,
    ) -> _T:
        """Have the work done; return its value, or raise its error.

        Args:
            give_up: Called in another thread if the caller leaves before the work has ended.
            within_s: How long to wait at most, in seconds; infinite if the work itself keeps the deadline.
            scope: Who can cancel the caller.

        Raises:
            PromiseTimeoutError: The work has not ended in time.
            CallCancelledError: The scope was cancelled.
        """
        try:
            _worker_pool.submit(self._execute)
            with fail_on_cancel(scope, self.fail):
                return self._promise.wait(within_s)
        except BaseException:
            if not self._has_ended:
                _worker_pool.submit(give_up)
            raise

    def start(self) -> None:
        """Have the work done, and do not wait for it: `wait` does. Instead of `run`."""
        _worker_pool.submit(self._execute)

    def wait(self, within_s: float = math.inf) -> _T:
        """Return the value of work that was started, or raise its error.

        Raises:
            PromiseTimeoutError: The work has not ended in time.
        """
        return self._promise.wait(within_s)

    def fail(self, error: BaseException) -> None:
        """Make the caller stop waiting, and raise an error. It has no effect once the work has ended."""
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
        del (
            self._work
        )  # the thread may be idle for long, and must not keep alive what the work refers to


class _WorkerPool:
    """Threads that work for the main thread. They do not keep the process alive.

    Each thread has a queue of its own, which is in `_idle` while the thread has nothing to do. The main thread takes a
    queue and puts the work there: it holds no lock, and waits for none.
    """

    def __init__(self) -> None:
        self._idle: deque[_WorkQueue] = deque()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        self._idle = deque()

    def submit(self, work: Callable[[], object]) -> None:
        try:
            queue = self._idle.pop()
        except IndexError:
            queue = SimpleQueue()
            queue.put(work)
            # not by `threading`: its `start` waits for the new thread, with a lock held
            _thread.start_new_thread(self._serve, (queue, self._idle))
        else:
            queue.put(work)

    @staticmethod
    def _serve(queue: _WorkQueue, idle: deque[_WorkQueue]) -> None:
        # as threads of `threading` do: otherwise debuggers and coverage would not see the work
        if (trace := threading.gettrace()) is not None:
            sys.settrace(trace)
        waits_count = 0
        while waits_count < 2:
            try:
                # without a name for the work, which would keep it alive until the next
                queue.get(timeout=_IDLE_TIMEOUT_S)()
            except Empty:
                try:
                    idle.remove(queue)
                except ValueError:
                    # The main thread has taken the queue, and is about to put work there: wait once more. But not
                    # for ever: an interrupt may have struck between the two.
                    waits_count += 1
                else:
                    return
            else:
                waits_count = 0
                idle.append(queue)


_worker_pool: Final = _WorkerPool()
