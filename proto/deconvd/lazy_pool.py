"""Threads that are started when they are needed first, and anew in a forked child."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from deconvd.system import call_in_forked_children

__all__ = ["LazyPool"]


class LazyPool:
    """A pool of threads, to be made once for a process and its forked children.

    Args:
        threads_count: At most.
        name: What their names begin with.
    """

    def __init__(self, threads_count: int, name: str) -> None:
        self._threads_count = threads_count
        self._name = name
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        call_in_forked_children(self._forget)

    def get(self) -> ThreadPoolExecutor:
        """Return the threads."""
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(self._threads_count, self._name)
            return self._executor

    def _forget(self) -> None:
        """Start over: a forked child has none of its parent's threads."""
        self._lock = threading.Lock()
        self._executor = None
