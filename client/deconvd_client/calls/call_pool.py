"""Calls in background threads, a limited number at a time, each with a future that can cancel it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial
from typing import Any, Final, ParamSpec, TypeVar

from deconvd.errors import CallCancelledError, DeadlineError
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd_client.calls.cancel_scope import CancelScope, current_cancel_scope
from deconvd_client.calls.uninterrupted import run_in_background

__all__ = ["CallPool"]

_P = ParamSpec("_P")
_T = TypeVar("_T")

_QUEUE_CHECK_INTERVAL_S: Final = 0.05
"""How often the queue is searched for calls whose time is up, while there is one."""


_CLOSED: Final = "the connection is closed"


class _CallFuture(Future[_T]):
    """The future of a call, which can be cancelled at any time before it has ended.

        PENDING --the function returns or raises--> RUNNING --its outcome is set--> FINISHED
        PENDING --`cancel`--> CANCELLED --the function has ended, or will not begin--> CANCELLED_AND_NOTIFIED

    So a call that runs is PENDING to the base class, which cancels nothing in the state RUNNING.

    Args:
        work: Makes the call.

    Attributes:
        scope: The scope of the call.
    """

    def __init__(self, work: Callable[[], _T]) -> None:
        super().__init__()
        self.scope = CancelScope()
        self._has_begun = False
        # A list, whose `pop` is atomic: one thread takes the work, to do it, or to have it not done.
        self._works = [work]

    def cancel(self) -> bool:
        if not super().cancel():
            return False
        self.scope.cancel()
        if self._take_work() is not None:
            self.set_running_or_notify_cancel()  # nobody else will: the call never begins
        return True

    def running(self) -> bool:
        return self._has_begun and not self.done()

    def abandon(self, error: BaseException) -> None:
        """Set an error, unless the call has begun."""
        if self._take_work() is not None and self.set_running_or_notify_cancel():
            self.set_exception(error)

    def _take_work(self) -> Callable[[], _T] | None:
        try:
            return self._works.pop()
        except IndexError:
            return None

    @staticmethod
    def run(future: _CallFuture[_T]) -> None:
        """Make the call, unless it was cancelled. A static method, so that it can drop its reference to the future."""
        work = future._take_work()
        if work is None:
            return
        future._has_begun = True
        try:
            value = work()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            del (
                future
            )  # the error's traceback refers to this frame: a cycle, which would keep the arrays
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(value)


class CallPool:
    """Makes calls in background threads. Calls beyond a limit wait for their turn, in their order. Thread-safe.

    Its threads do not keep the process alive. A forked child has none of its parent's calls.

    Args:
        limit: How many calls run at the same time.
        timeout_s: How long a call may wait for its turn.
        prepare: Called in the thread of a call, before it.
    """

    def __init__(self, limit: int, timeout_s: float, prepare: Callable[[], object]) -> None:
        self._limit = limit
        self._timeout_s = timeout_s
        self._prepare = prepare
        self._lock = new_lock()
        self._is_closed = False
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Have no calls, as in a forked child."""
        self._queue: deque[_CallFuture[Any]] = deque()
        self._running: set[_CallFuture[Any]] = set()
        self._is_watched = False
        # Those that were started and have not ended, or fewer: an interrupt may come between the start and the count.
        self._threads_count = 0

    def submit(
        self, function: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs
    ) -> Future[_T]:
        """Have a function called in another thread, in a copy of the current context. Return its future."""
        context = copy_context()
        future: _CallFuture[_T] = _CallFuture(partial(context.run, function, *args, **kwargs))
        context.run(current_cancel_scope.set, future.scope)
        try:
            with self._lock:
                if self._is_closed:
                    raise CallCancelledError(_CLOSED)
                self._queue.append(future)
                needs_thread = not self._is_watched or len(self._running) < self._limit
                # each of them looks at the queue before it ends, so there need not be more: one for each call that may
                # run, and one to watch
                needs_thread &= self._threads_count <= self._limit
            if needs_thread:
                run_in_background(self._serve)
                with self._lock:
                    self._threads_count += 1
        except BaseException:  # an interrupt, or no thread could be started
            future.cancel()
            raise
        return future

    def close(self) -> None:
        """Cancel all calls: those that wait, and those that run, raise CallCancelledError."""
        with self._lock:
            self._is_closed = True
            waiting, self._queue = [*self._queue], deque()
            running = [*self._running]
        for future in waiting:
            future.abandon(CallCancelledError(_CLOSED))
        for future in running:
            future.scope.cancel(_CLOSED)

    # The methods below run in background threads.

    def _serve(self) -> None:
        """Make calls until none waits. If enough threads do so, watch those that wait instead."""
        while True:
            with self._lock:
                if not self._queue:
                    self._threads_count -= 1
                    return
                is_full = len(self._running) >= self._limit
                if is_full and self._is_watched:
                    self._threads_count -= 1
                    return
                # at once: `submit` counts on a thread that has not ended to look at the queue, unless it watches
                if is_full:
                    self._is_watched = True
                else:
                    future = self._queue.popleft()
                    self._running.add(future)
            if is_full:
                self._watch_queue()
                return
            self._prepare()
            _CallFuture.run(future)
            with self._lock:
                self._running.discard(future)
            del future  # the thread may be idle for long, and must not keep the result alive

    def _watch_queue(self) -> None:
        """End calls that have waited for too long. It ends once no call waits."""
        while True:
            with self._lock:
                while self._queue and self._queue[0].done():
                    self._queue.popleft()
                if not self._queue:
                    self._is_watched = False
                    self._threads_count -= 1
                    return
                future = self._queue[0]
                is_late = time.monotonic() >= future.scope.began_s + self._timeout_s
                if is_late:
                    self._queue.popleft()
            if is_late:
                future.abandon(
                    DeadlineError(
                        f"the call waited for its turn for the {self._timeout_s:g} s that timeout_s of connect() "
                        f"allows: {self._limit} others were running. max_concurrent_calls of connect() raises that "
                        "number."
                    )
                )
            del future
            if not is_late:
                time.sleep(_QUEUE_CHECK_INTERVAL_S)
