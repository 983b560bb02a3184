"""Deconvolution by its definition, in float64: slow, and too plain to be wrong.

On each axis, tap k of the filter links input pixel i to output pixel s i + d k - p, if the output has
such a pixel. y sums x W over the links, and each gradient sums the product of the other two over them.
Nothing here comes from the device: loops over pixels and taps, straight from the formula.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import Problem

__all__ = ["bias_gradient", "deconvolve", "gradients"]

_Index = tuple[slice, slice, int, int]


def deconvolve(problem: Problem, x: Array, W: Array, b: Array | None = None) -> Array:
    """Return y in float64."""
    x, W = _to_float64(x), _to_float64(W)
    y = np.zeros(problem.y.shape)
    for at_x, at_W, at_y in _links(problem):
        y[at_y] += x[at_x] @ W[at_W]
    if b is not None:
        for channel, value in enumerate(_to_float64(b)):
            y[:, channel] += value
    return y


def gradients(problem: Problem, x: Array, W: Array, gy: Array) -> tuple[Array, Array, Array]:
    """Return gx, gW and gb in float64."""
    x, W, gy = _to_float64(x), _to_float64(W), _to_float64(gy)
    gx, gW = np.zeros(problem.x.shape), np.zeros(problem.W.shape)
    for at_x, at_W, at_y in _links(problem):
        gx[at_x] += gy[at_y] @ W[at_W].T
        gW[at_W] += x[at_x].T @ gy[at_y]
    return gx, gW, bias_gradient(gy)


def bias_gradient(gy: Array) -> Array:
    """Return gb in float64."""
    return np.array([_to_float64(gy)[:, channel].sum() for channel in range(gy.shape[1])])


def _to_float64(array: Array) -> Array:
    return array.astype(np.float64)


def _links(problem: Problem) -> Iterator[tuple[_Index, _Index, _Index]]:
    """Yield where in x, W and y each group of channels meets: a matrix of each (rows are samples or c_I)."""
    everything = slice(None)
    for i_h, k_h, o_h in _axis_links(problem, 0):
        for i_w, k_w, o_w in _axis_links(problem, 1):
            for ins, outs in _groups(problem):
                yield (
                    (everything, ins, i_h, i_w),
                    (ins, everything, k_h, k_w),
                    (everything, outs, o_h, o_w),
                )


def _axis_links(problem: Problem, axis: int) -> Iterator[tuple[int, int, int]]:
    geometry = problem.geometry
    for i in range(problem.image[axis]):
        for k in range(problem.kernel[axis]):
            o = geometry.stride[axis] * i + geometry.dilate[axis] * k - geometry.pad[axis]
            if 0 <= o < problem.output[axis]:
                yield i, k, o


def _groups(problem: Problem) -> Iterator[tuple[slice, slice]]:
    ins, outs = problem.c_I // problem.groups, problem.c_O // problem.groups
    for group in range(problem.groups):
        yield slice(group * ins, (group + 1) * ins), slice(group * outs, (group + 1) * outs)
