"""Results of problems without products: an operand is empty, so that there is nothing to do for a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from deconvd.operation import spec_of_field
from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.device.tensor import Tensor

__all__ = ["result_without_products", "sum_gb"]


def result_without_products(
    problem: Problem,
    field: str,
    operands: Mapping[str, Tensor],
    fetch: Callable[[Tensor], Array],
) -> Array:
    """Return a result, read-only: zeros, but for a bias in y and for gb where y has elements.

    Args:
        field: Its name.
        operands: By the names of their fields.
        fetch: Returns an operand's elements.
    """
    spec = spec_of_field(problem, field)
    if field == "y" and "b" in operands:
        return np.broadcast_to(fetch(operands["b"])[:, None, None], spec.shape)
    if field == "gb":
        return sum_gb(fetch(operands["gy"]))
    return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)


def sum_gb(gy: Array) -> Array:
    """Return gb, in the element type of gy: a number beyond that type's range is infinite."""
    # Sums over whole batches lose digits in float32, and a column of gy is soon read.
    with np.errstate(all="ignore"):
        gb: Array = gy.sum(axis=(0, 2, 3), dtype=np.float64).astype(gy.dtype)
    return gb
