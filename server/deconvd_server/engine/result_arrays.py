"""Arrays for results that are sent in messages, from a pool of reused memory."""

from __future__ import annotations

from typing import Final

from deconvd.errors import ExhaustedError
from deconvd.host.buffer_pool import BufferPool
from deconvd.model.dtypes import Array
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.resources.budgets import budgets

__all__ = ["idle_result_bytes", "new_result"]

_RESULT_POOL: Final = BufferPool(budgets().pool_bytes)


def new_result(problem: Problem, spec: TensorSpec) -> Array:
    """Return a new array for a result of a problem: C-contiguous, in native byte order, with undefined elements.

    Args:
        spec: Shape and element type of the result.

    Raises:
        ExhaustedError: There is no memory for it.
    """
    try:
        return _RESULT_POOL.empty(spec)
    except MemoryError:
        raise ExhaustedError(
            f"the server has no memory left for a result of {spec.nbytes} bytes, for x {problem.x}, "
            f"W {problem.W}, y {problem.y}"
        ) from None


def idle_result_bytes() -> int:
    """Return how much memory is kept for the next results."""
    return _RESULT_POOL.idle_bytes
