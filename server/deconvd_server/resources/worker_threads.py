"""Worker threads, which serve calls one after the other. If one cannot be started, the others serve its calls."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import SimpleQueue
from typing import Final, ParamSpec, TypeAlias, TypeVar

from deconvd.errors import UnavailableError
from deconvd_server.log_handler import REPEAT_KEY

__all__ = ["Workers", "WorkersExecutor"]

_RETRY_AFTER_S: Final = 1.0
"""How long a caller should wait if no thread can be started for it: such a shortage rarely ends at once."""

_Work: TypeAlias = Callable[[], None]
_P = ParamSpec("_P")
_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class Workers:
    """A pool of threads. A few are started at once, and the others when they are needed.

    If the system has no thread left, work waits for the threads that there are.

    Args:
        threads_count: Largest number of threads.
        prestarted_count: How many of them are started at once.
        name: Name of the threads.
    """

    def __init__(self, threads_count: int, prestarted_count: int, *, name: str = "worker") -> None:
        self._name = name
        self._threads_count = threads_count
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        for _ in range(prestarted_count):
            if not self._start():
                break
            self._idle.release()

    def submit(self, work: _Work) -> None:
        """Have a thread call `work`, which must not raise. Returns at once.

        Raises:
            UnavailableError: There is no thread, and none can be started.
        """
        # `_idle` counts idle threads: starting another is tried only if there are none
        if not self._idle.acquire(blocking=False) and not self._start() and not self._threads:
            raise UnavailableError(
                "the server has no thread to serve the call", retry_after_s=_RETRY_AFTER_S
            )
        self._work.put(work)

    def close(self) -> None:
        """Let the threads end, and return once they have ended."""
        with self._lock:
            threads, self._threads_count = list(self._threads), 0
        for _ in threads:
            self._work.put(None)
        for thread in threads:
            thread.join()

    def _start(self) -> bool:
        """Start another thread; return False if that fails, or if there are enough already."""
        with self._lock:
            if len(self._threads) >= self._threads_count:
                return False
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            try:
                thread.start()
            except (RuntimeError, MemoryError) as error:
                _log.warning(
                    "there are %d threads named %s, and the system has none left for more",
                    len(self._threads),
                    self._name,
                    extra={REPEAT_KEY: (__name__, self._name)},
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
            del work  # it refers to the call, which must not live until the next one comes
            self._idle.release()


class WorkersExecutor(Executor):
    """Workers as an executor.

    The standard library's `ThreadPoolExecutor` is not used: if it cannot start a thread, it raises but leaves
    the work in its queue.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Have a worker call a function. Raises UnavailableError if there is no thread, and none can be started."""
        future: Future[_T] = Future()
        self._workers.submit(partial(_fulfil, future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let the workers end, and return once all submitted work is done."""
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
