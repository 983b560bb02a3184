"""The event loop in which gRPC is served: one for the process, in a thread of its own, from its first use on.

gRPC has one queue of events for a process, and loops that end leave theirs behind; so this one never does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any, TypeVar

__all__ = ["EventLoop", "the_loop"]

_T = TypeVar("_T")


class EventLoop:
    """A loop that runs in a thread of its own, for as long as the process does.

    Attributes:
        loop: The loop.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._on_lost: list[Callable[[], None]] = []
        self._thread = threading.Thread(target=self._run, name="grpc", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Begin to run a coroutine, and return what will have its result. Any thread but the loop's may call this."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, _T], timeout_s: float | None = None) -> _T:
        """Run a coroutine, and return what it returns. Raises TimeoutError if that takes too long."""
        return self.begin(work).result(timeout_s)

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` if the loop ends: in its thread, which ends then."""
        self._on_lost.append(callback)

    def _run(self) -> None:
        try:
            self.loop.run_forever()
        finally:
            for callback in self._on_lost:
                callback()


@cache
def the_loop() -> EventLoop:
    """Return the process's loop."""
    return EventLoop()
