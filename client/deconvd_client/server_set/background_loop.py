"""A loop in a background thread, which sleeps for as long as there is nothing to do."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.host.forks import new_lock, register_fork_reset
from deconvd_client.calls.uninterrupted import run_in_background

__all__ = ["BackgroundLoop"]

_MAX_SLEEP_S: Final = 30.0
"""How long the thread outlives an owner that was dropped without being closed, at most."""


_ERROR_PAUSE_S: Final = 1.0

_NAP_S: Final = 0.2
"""A shorter pause is no sleep: nobody needs to wake the thread."""


_log = logging.getLogger(__name__)


class BackgroundLoop:
    """Calls a function again and again, in a thread that does not keep the process alive. Thread-safe.

    Attributes:
        is_asleep: Whether the function is not called for a while, unless `wake` is.

    Args:
        work: Does what is due, and returns in how many seconds the next will be. Only a weak reference to its owner is
            kept.
    """

    def __init__(self, work: Callable[[], float]) -> None:
        self._work = weakref.WeakMethod(work)
        self._signals: SimpleQueue[bool] = SimpleQueue()  # True wakes the thread, False ends it
        self._lock = new_lock()
        self._is_running = False
        self._is_closed = False
        self.is_asleep: bool = True
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Start a thread at the next need: that of the parent does not exist in a forked child."""
        self._signals = SimpleQueue()
        self._is_running = False
        self.is_asleep = True

    def wake(self) -> None:
        """Have the function called soon."""
        with self._lock:
            if self._is_closed:
                return
            if not self._is_running:
                run_in_background(_LoopThread(self._work, self._signals, weakref.ref(self)).run)
                self._is_running = True
            self.is_asleep = False
        self._signals.put(True)

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._is_closed = True
        self._signals.put(False)


class _LoopThread:
    """The thread of a loop. It has no reference to the loop or its owner while it sleeps."""

    def __init__(
        self,
        work: weakref.WeakMethod[Callable[[], float]],
        signals: SimpleQueue[bool],
        loop: weakref.ref[BackgroundLoop],
    ) -> None:
        self._work = work
        self._signals = signals
        self._loop = loop

    def run(self) -> None:
        """Work until the loop is closed, or its owner dropped."""
        pause_s = _MAX_SLEEP_S  # until the first signal
        while True:
            try:
                if not self._signals.get(timeout=min(pause_s, _MAX_SLEEP_S)):
                    return
            except Empty:
                pass
            work, loop = self._work(), self._loop()
            if work is None or loop is None:
                return
            loop.is_asleep = False
            try:
                pause_s = work()
            except Exception:  # noqa: BLE001 - whatever it is, the loop goes on
                _log.exception("unforeseen error")
                pause_s = _ERROR_PAUSE_S
            loop.is_asleep = pause_s > _NAP_S
            del work, loop
