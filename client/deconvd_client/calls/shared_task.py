"""Work in the background that several calls wait for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue

from deconvd.host.forks import new_lock, register_fork_reset
from deconvd_client.calls.uninterrupted import run_in_background

__all__ = ["SharedTask"]


class SharedTask:
    """Work that is under way at most once at a time, however many calls want it done. Thread-safe."""

    def __init__(self) -> None:
        self._lock = new_lock()
        self._end_signal: SimpleQueue[None] | None = None  # while the work is under way
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Let the work begin again in a forked child, where the thread that did it does not exist."""
        self._end_signal = None

    def run(self, work: Callable[[], object], within_s: float) -> None:
        """Have the work done in the background, unless it is under way. Wait until it has ended.

        Args:
            work: It must not raise an exception. It is not kept, so that it may refer to the owner of this.
            within_s: How long to wait at most, in seconds.
        """
        with self._lock:
            signal = self._end_signal
            if signal is None:
                signal = SimpleQueue()
                run_in_background(partial(self._execute, work, signal))
                self._end_signal = (
                    signal  # last: an interrupt before must not leave work that never began
                )
        with suppress(Empty):
            signal.get(timeout=within_s)
            signal.put(None)  # for others who wait

    def _execute(self, work: Callable[[], object], signal: SimpleQueue[None]) -> None:
        try:
            work()
        finally:
            with self._lock:
                if self._end_signal is signal:
                    self._end_signal = None
            signal.put(None)
