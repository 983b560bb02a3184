"""Threads that serve calls, one call after the other. A thread that cannot be started ends nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Final, ParamSpec, TypeAlias, TypeVar

from deconvd.errors import UnavailableError

__all__ = ["Workers", "WorkersExecutor"]

_RETRY_AFTER_S: Final = 1.0
"""What a caller is told whom no thread can serve: what took all of the system's threads is rarely gone at once."""

_Work: TypeAlias = Callable[[], None]
_P = ParamSpec("_P")
_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Workers:
    """A number of threads, of which a few are started early and the others as they are needed.

    Where the system has no thread left, work waits for those that there are.

    Args:
        threads_count: The most there are.
        early_count: How many of them are started now.
        name: Of the threads.
    """

    def __init__(self, threads_count: int, early_count: int, *, name: str = "worker") -> None:
        self._name = name
        self._threads_count = threads_count
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        for _ in range(early_count):
            if not self._start():
                break
            self._idle.release()

    def submit(self, work: _Work) -> None:
        """Have a thread do something, which must not raise. Returns at once.

        Raises:
            UnavailableError: There is no thread, and none can be started.
        """
        if not self._idle.acquire(blocking=False) and not self._start() and not self._threads:
            raise UnavailableError(
                "the server has no thread to serve the call", retry_after_s=_RETRY_AFTER_S
            )
        self._work.put(work)

    def close(self) -> None:
        """Let the threads end, and return once they have."""
        with self._lock:
            threads, self._threads_count = list(self._threads), 0
        for _ in threads:
            self._work.put(None)
        for thread in threads:
            thread.join()

    def _start(self) -> bool:
        """Start another thread, and return whether there is one more."""
        with self._lock:
            if len(self._threads) >= self._threads_count:
                return False
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                _log.warning(
                    "calls have %d threads of the kind %s: there is none left",
                    len(self._threads),
                    self._name,
                )
                _log.debug("a thread cannot be started: %s", error)
                return False
            self._threads.append(thread)
            return True

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                work()
            except BaseException:  # noqa: BLE001 - logged: the worker serves others
                _log.exception("unforeseen error in a worker")
            del work
            self._idle.release()


class WorkersExecutor(Executor):
    """Workers as an executor. One of the library leaves work in its queue that it has no thread for."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Have a worker call a function. Raises UnavailableError if there is none, and none can be started."""
        future: Future[_T] = Future()
        self._workers.submit(partial(_fulfil, future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the workers end, and return once they have done all that was submitted."""
        self._workers.close()


def _fulfil(future: Future[_T], work: Callable[[], _T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the future has it
        future.set_exception(error)
        del future  # the error holds this frame, which must not hold it in turn
    else:
        future.set_result(result)
