"""Columns, the values that each tap of the filter adds to the output image, for a block of the input image.

    x, W --matrix product--> columns --scatter (col2im)--> y
                             columns <--gather (im2col)--- gy      columns, W --> gx      columns, x --> gW

Columns have the shape (samples, groups, channels, taps, h, w): for each pixel of the block and each tap, one value of
an output channel. On each axis, tap k links input pixel i to output pixel s i + d k - p.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from deconvd.model.dtypes import Array, DType
from deconvd.model.problem import Problem
from deconvd_server.device.cpu.blocking import ImageBlock

__all__ = ["TapLinks", "linked_pixels", "linked_taps"]

_MIN_TAPS_PER_PIXEL = 4
"""The loop is over pixels if there are at least this many times as many taps as pixels. Else it is over taps, since the
pixels of one tap are a longer run of memory."""

_Index = int | slice
_AxisLink = tuple[_Index, _Index, slice]
"""On one axis: a tap and the pixels that it links, or taps and the pixel that they link; and the output pixels."""


class TapLinks:
    """The links of a block: from its pixels, by its taps, to output pixels.

    Its loops run over taps or pixels, whichever are (about) fewer, because a client chooses the number of both.

    Args:
        image: A block of the input image.
        h_taps, w_taps: Whole rows of the filter, or a part of one row.
    """

    __slots__ = ("_h", "_size", "_w")

    def __init__(self, problem: Problem, image: ImageBlock, h_taps: slice, w_taps: slice) -> None:
        self._size = (h_taps.stop - h_taps.start, w_taps.stop - w_taps.start, *image.size)
        self._h = [*_axis_links(problem, 0, image.h, h_taps)]
        self._w = [*_axis_links(problem, 1, image.w, w_taps)] if self._h else []

    def __bool__(self) -> bool:
        """Whether there are any links. Without links, the columns are zeros."""
        return bool(self._w)

    def scatter(self, columns: Array, y: Array) -> None:
        """Add columns to the output pixels that they are linked to.

        Args:
            columns: Shape ``(..., channels and taps, pixels)``.
            y: Shape ``(..., channels, h_O, w_O)``; modified.
        """
        by_axis = self._split_axes(columns, y)
        for h_taps, h_pixels, h_outputs in self._h:
            for w_taps, w_pixels, w_outputs in self._w:
                y[..., h_outputs, w_outputs] += by_axis[..., h_taps, h_pixels, w_taps, w_pixels]

    def gather(self, gy: Array, dtype: DType) -> Array:
        """Return columns with the values of the output pixels that they are linked to, and 0 where there is no link.

        Args:
            gy: Shape ``(..., channels, h_O, w_O)``.

        Returns:
            Shape ``(..., channels and taps, pixels)``.
        """
        h, w, *image = self._size
        columns = np.zeros((*gy.shape[:-3], gy.shape[-3] * h * w, math.prod(image)), dtype)
        by_axis = self._split_axes(columns, gy)
        for h_taps, h_pixels, h_outputs in self._h:
            for w_taps, w_pixels, w_outputs in self._w:
                by_axis[..., h_taps, h_pixels, w_taps, w_pixels] = gy[..., h_outputs, w_outputs]
        return columns

    def _split_axes(self, columns: Array, images: Array) -> Array:
        """View columns as (..., channels, h taps, h, w taps, w)."""
        return columns.reshape(*images.shape[:-2], *self._size).swapaxes(-3, -2)


def linked_taps(problem: Problem, axis: int, pixels: slice) -> tuple[int, int]:
    """Return the range of taps, first and last plus 1, that may link any of some input pixels, on one axis."""
    geometry = problem.geometry
    return _span(geometry.dilate[axis], geometry.stride[axis], pixels, problem, axis)


def linked_pixels(problem: Problem, axis: int, taps: slice) -> tuple[int, int]:
    """Return the range of input pixels that any of some taps may link, as `linked_taps` does."""
    geometry = problem.geometry
    return _span(geometry.stride[axis], geometry.dilate[axis], taps, problem, axis)


def _span(
    step: int, other_step: int, others: slice, problem: Problem, axis: int
) -> tuple[int, int]:
    p, output = problem.geometry.pad[axis], problem.output[axis]
    first = -((other_step * (others.stop - 1) - p) // step)
    last = (output - 1 + p - other_step * others.start) // step
    return first, last + 1


def _axis_links(problem: Problem, axis: int, pixels: slice, taps: slice) -> Iterator[_AxisLink]:
    """Yield the links of some pixels and some taps on one axis. Both are counted from the first of their range."""
    s, d = problem.geometry.stride[axis], problem.geometry.dilate[axis]
    p, output = problem.geometry.pad[axis], problem.output[axis]
    if (pixels.stop - pixels.start) * _MIN_TAPS_PER_PIXEL > taps.stop - taps.start:
        for tap in range(taps.start, taps.stop):
            if linked := _link_range(s, d * tap - p, pixels, output):
                yield tap - taps.start, *linked
    else:
        for pixel in range(pixels.start, pixels.stop):
            if linked := _link_range(d, s * pixel - p, taps, output):
                yield linked[0], pixel - pixels.start, linked[1]


def _link_range(step: int, offset: int, some: slice, output: int) -> tuple[slice, slice] | None:
    """Return the i of a range that have an output pixel ``step i + offset``, and these pixels; None if there are none.

    Each i is counted from the first of the range.
    """
    first = max(some.start, -(offset // step))  # the least i with step i + offset >= 0
    last = min(some.stop - 1, (output - 1 - offset) // step)
    if last < first:
        return None
    outputs = slice(step * first + offset, step * last + offset + 1, step)
    return slice(first - some.start, last - some.start + 1), outputs
