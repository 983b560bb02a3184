"""Results of problems without products: an operand is empty, so there is no work for a card."""

from __future__ import annotations

import numpy as np

from deconvd.gradients import Gradients, Wanted
from deconvd.problem import Problem, TensorSpec
from deconvd.tensor import Array

__all__ = ["empty_gradients", "empty_y"]


def empty_y(problem: Problem, b: Array | None) -> Array:
    """Return y: the bias, or zeros."""
    y = _zeros(problem.y)
    if b is not None:
        y += b[:, None, None]
    return y


def empty_gradients(problem: Problem, gy: Array, wanted: Wanted) -> Gradients:
    """Return the wanted gradients: zeros, but for gb where y has elements."""
    return Gradients(
        gx=_zeros(problem.x) if wanted.gx else None,
        gW=_zeros(problem.W) if wanted.gW else None,
        gb=gy.sum(axis=(0, 2, 3), dtype=np.float64).astype(gy.dtype) if wanted.gb else None,
    )


def _zeros(spec: TensorSpec) -> Array:
    return np.zeros(spec.shape, spec.dtype)
