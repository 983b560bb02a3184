"""The arrays that results are sent from."""

from __future__ import annotations

from typing import Final

from deconvd.errors import ExhaustedError
from deconvd.host.buffer_pool import BufferPool
from deconvd.model.dtypes import Array
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.resources.budgets import budgets

__all__ = ["new_result"]

_RESULT_POOL: Final = BufferPool(budgets().pool_bytes)
"""Memory for results that are sent."""


def new_result(problem: Problem, spec: TensorSpec) -> Array:
    """Return a new array for a result of a problem: C-contiguous, in native byte order, with any elements.

    Args:
        spec: What the result will be.

    Raises:
        ExhaustedError: There is no memory for it.
    """
    try:
        return _RESULT_POOL.empty(spec)
    except MemoryError:
        raise ExhaustedError(
            f"the server has not the memory for x {problem.x}, W {problem.W}, y {problem.y}"
        ) from None
