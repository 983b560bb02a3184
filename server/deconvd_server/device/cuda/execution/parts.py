"""How the samples of a large call are divided into parts that are computed one after the other. Pure."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Final

from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES

__all__ = ["count_parts", "problem_of_part"]

_PART_BYTES: Final = 4 << 20
"""Bytes of x and y in a part: the card takes as long to copy them as the host takes to enqueue the part."""

_MAX_PARTS_COUNT: Final = 8

_SMALL_PART_BYTES: Final = 2 << 20
"""Bytes of x and y in a part, where a call has too few for parts of `_PART_BYTES`."""

_SMALL_PARTS_COUNT: Final = 4
"""The most small parts: a graph of few parts is launched soon."""

_LRU_ENTRIES_COUNT: Final = 1024


@lru_cache(_LRU_ENTRIES_COUNT)
def count_parts(problem: Problem) -> int:
    """Return the number of parts in which y is computed where the card reaches x and y; 1 if it is not divided.

    All parts have the same number of samples, and begin at addresses that are aligned as plans need it.
    """
    x_bytes, y_bytes = problem.x.nbytes, problem.y.nbytes
    few = min((x_bytes + y_bytes) // _SMALL_PART_BYTES, _SMALL_PARTS_COUNT)
    most = min(max((x_bytes + y_bytes) // _PART_BYTES, few), _MAX_PARTS_COUNT)
    for count in range(most, 1, -1):
        part_bytes = x_bytes // count | y_bytes // count  # a multiple of a power of two if both are
        if problem.n % count == 0 and part_bytes % OPERAND_ALIGNMENT_BYTES == 0:
            return count
    return 1


@lru_cache(_LRU_ENTRIES_COUNT)
def problem_of_part(problem: Problem, count: int) -> Problem:
    """Return the problem of one of `count` equal parts of a problem's samples."""
    n, *sample = problem.x.shape
    return replace(problem, x=TensorSpec((n // count, *sample), problem.x.dtype))
