"""The waits of threads for a device, in native code that nothing can interrupt."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["NativeWaits"]

_T = TypeVar("_T")


class NativeWaits:
    """Notes since when threads have waited for a device. Thread-safe.

    A thread that waits in native code can neither be interrupted nor look at a clock. So another one looks at this.
    """

    def __init__(self) -> None:
        self._began_s: dict[int, float] = {}  # by thread; each step is atomic in the interpreter

    def run(self, function: Callable[..., _T], *arguments: object) -> _T:
        """Return what a function returns that waits for the device. It must let other threads run meanwhile."""
        thread = threading.get_ident()
        self._began_s[thread] = time.monotonic()
        try:
            return function(*arguments)
        finally:
            del self._began_s[thread]

    @property
    def since_s(self) -> float:
        """Since when the longest wait has lasted, on the monotonic clock; infinity if no thread waits."""
        return min(self._began_s.copy().values(), default=math.inf)
