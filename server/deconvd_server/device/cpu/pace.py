"""A bound below the time that a problem takes on this processor. A call that cannot meet its deadline is not started.

It is a roofline: the bound is the larger of two times, each at the best rate that was measured.

    products    multiplications of elements of x, W or gy, at the rate of a large matrix product
    columns     elements of the columns (see `columns`): links of a tap and a pixel, for each sample and output channel,
                at the rate of a copy, since each is at least written and read once
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from functools import cache, lru_cache
from typing import Final, NamedTuple

import numpy as np

from deconvd.model.problem import Problem

__all__ = ["Roofline", "links_count"]

_LRU_ENTRIES_COUNT: Final = 4096
"""Problems whose work is remembered."""

_LARGE_COUNT: Final = 1 << 30
"""Products, counted as if all taps linked all pixels, from which on a problem is large. Fewer take some 50 ms."""

_CHUNK_TAPS_COUNT: Final = 1 << 16
"""Taps whose links are counted in one array: half a MiB."""

_TRIALS_COUNT: Final = 5
"""Trials of a benchmark, of which the best counts: at least one should find the processor free."""

_BENCHMARK_COLUMNS_COUNT: Final = 1 << 17
"""Elements of the copy that is timed. With their copy they fit in a core's second-level cache."""

_BENCHMARK_EXTENT: Final = 384
"""Height and width of the matrices whose product is timed. It takes about a millisecond, and runs at full speed."""


class _Work(NamedTuple):
    """The work of a problem, which is the same for each of y, gx and gW."""

    products_count: int
    columns_count: int


class Roofline:
    """A bound below the duration of calls.

    Args:
        threads_count: Threads that may work for a call.
    """

    def __init__(self, threads_count: int) -> None:
        products_per_s, columns_per_s = _measure_rates()
        self._products_per_s = threads_count * products_per_s
        self._columns_per_s = threads_count * columns_per_s
        self._work = lru_cache(_LRU_ENTRIES_COUNT)(_large_work)  # every call needs it

    def min_duration_s(self, problem: Problem, results: Collection[str]) -> float:
        """Return the seconds that a call takes at the best rate of this processor; 0 if its problem is not large."""
        work = self._work(problem)
        if work is None:
            return 0.0
        once_s = max(
            work.products_count / self._products_per_s, work.columns_count / self._columns_per_s
        )
        return once_s * sum(result != "gb" for result in results)


def _large_work(problem: Problem) -> _Work | None:
    """Return the work of a problem; None if it is not large."""
    (h_I, w_I), (h_K, w_K) = problem.image, problem.kernel
    depth = max(problem.c_I // problem.groups, 1)
    images_count = problem.n * problem.c_O
    if images_count * h_K * w_K * h_I * w_I * depth < _LARGE_COUNT:
        return None
    columns_count = images_count * links_count(problem, 0) * links_count(problem, 1)
    return _Work(columns_count * depth, columns_count)


def links_count(problem: Problem, axis: int) -> int:
    """Return the number of pairs of a tap and an input pixel on one axis that have an output pixel."""
    s, d = problem.geometry.stride[axis], problem.geometry.dilate[axis]
    taps_count, pixels_count = problem.kernel[axis], problem.image[axis]
    # Loop over taps or pixels, whichever are fewer: a client may send a problem with a great many of one.
    fewer = (taps_count, d, pixels_count, s), (pixels_count, s, taps_count, d)
    count, step, others_count, other_step = min(fewer)
    total = 0
    for start in range(0, count, _CHUNK_TAPS_COUNT):
        some = np.arange(start, min(start + _CHUNK_TAPS_COUNT, count), dtype=np.int64)
        offsets = step * some - problem.geometry.pad[axis]
        first = np.maximum(-(offsets // other_step), 0)
        last = np.minimum((problem.output[axis] - 1 - offsets) // other_step, others_count - 1)
        total += int(np.maximum(last - first + 1, 0).sum())
    return total


@cache
def _measure_rates() -> tuple[float, float]:
    """Return the products and the columns that a thread does in a second at best, measured at the first call."""
    matrix = np.ones((_BENCHMARK_EXTENT, _BENCHMARK_EXTENT), np.float32)
    columns, copy = np.ones((2, _BENCHMARK_COLUMNS_COUNT), np.float32)
    return (
        _BENCHMARK_EXTENT**3 / _best_s(lambda: np.matmul(matrix, matrix)),
        _BENCHMARK_COLUMNS_COUNT / _best_s(lambda: np.copyto(copy, columns)),
    )


def _best_s(trial: Callable[[], object]) -> float:
    # other processes may slow some trials down, but none speeds one up
    durations_s = []
    for _ in range(_TRIALS_COUNT):
        begin_s = time.perf_counter()
        trial()
        durations_s.append(time.perf_counter() - begin_s)
    return min(durations_s)
