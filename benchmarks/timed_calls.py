"""How the clients of a benchmark call together: for a while to warm up, then for the time that counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Durations", "time_calls", "warm_up"]


@dataclass(frozen=True)
class Durations:
    """How long a client calls.

    Attributes:
        warm_up_calls, warm_up_s: After the first call, which has the plans tuned, there are this many more or those of
            this time: the client learns how many connections pay.
        time_s: How long the calls count.
    """

    warm_up_calls: int
    warm_up_s: float
    time_s: float


def warm_up(call: Callable[[], None], durations: Durations) -> None:
    """Call for a while."""
    end_s = time.perf_counter() + durations.warm_up_s
    for _ in range(durations.warm_up_calls):
        if time.perf_counter() >= end_s:
            break
        call()


def time_calls(call: Callable[[], None], time_s: float) -> tuple[float, float]:
    """Return the median latency in milliseconds, and the rate in calls per second."""
    times_s: list[float] = []
    now_s = time.perf_counter()
    end_s = now_s + time_s
    while now_s < end_s:
        start_s = now_s
        call()
        now_s = time.perf_counter()
        times_s.append(now_s - start_s)
    # the last call ends behind the time, when others may call no more: only its part before counts
    count = len(times_s) - (now_s - end_s) / times_s[-1]
    return statistics.median(times_s) * 1e3, count / time_s
