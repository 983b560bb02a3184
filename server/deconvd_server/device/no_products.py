"""Results of problems without products: an operand is empty, so that there is nothing to do for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from deconvd.operation import spec_of_field
from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.device.pieces import pieces
from deconvd_server.device.tensor import Tensor

__all__ = ["result_without_products", "set_gb"]


def result_without_products(
    problem: Problem,
    field: str,
    operands: Mapping[str, Tensor],
    fetch: Callable[[Tensor], Array],
    check: Callable[[], None],
) -> Array:
    """Return a result, read-only: zeros, but for a bias in y and for gb where y has elements.

    Args:
        field: Its name.
        operands: By the names of their fields.
        fetch: Returns an operand's elements.
        check: Called now and then; what it raises ends the work.
    """
    spec = spec_of_field(problem, field)
    if field == "y" and "b" in operands:
        return np.broadcast_to(fetch(operands["b"])[:, None, None], spec.shape)
    if field == "gb":
        gb = np.empty(spec.shape, spec.dtype)
        for _ in set_gb(gb, fetch(operands["gy"])):
            check()
        return gb
    return np.broadcast_to(np.zeros((), spec.dtype), spec.shape)


def set_gb(gb: Array, gy: Array) -> Iterator[None]:
    """Set gb, step by step: a number beyond its element type's range is infinite."""
    # Sums over whole batches lose digits in float32, and a column of gy is soon read.
    total = np.zeros(gb.shape, np.float64)
    for piece in pieces(gy.shape):
        with np.errstate(all="ignore"):
            total[piece[1:2]] += gy[piece].sum(axis=(0, 2, 3), dtype=np.float64)
        yield
    with np.errstate(all="ignore"):
        gb[...] = total
