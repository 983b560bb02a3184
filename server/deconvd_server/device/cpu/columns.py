"""Columns: what each tap of the filter adds to the output image, for a block of the input image.

Columns have the shape (samples, groups, channels, taps, h, w): for each pixel of the block and each tap, one value of
an output channel. A matrix product turns x and W into columns and `scatter` adds those to y (col2im); `gather` is its
adjoint and takes columns from gy (im2col), whose products with W and x are gx and gW. On each axis, tap k links input
pixel i to output pixel s i + d k - p.
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
"""How many times as many taps as pixels there must be for a loop over the pixels: taps have longer runs of memory."""

_Index = int | slice
_AxisLink = tuple[_Index, _Index, slice]
"""A tap and the pixels that it links, or a pixel and the taps that link it; and which output pixels."""


class TapLinks:
    """Which pixels of a block the taps of a block link to which output pixels.

    Their loops are as long as a block has taps or pixels, whichever are fewer, but for a factor: a client chooses
    both.

    Args:
        image: A block of the input image.
        h_taps, w_taps: Whole rows of the filter, or a part of one.
    """

    __slots__ = ("_h", "_size", "_w")

    def __init__(self, problem: Problem, image: ImageBlock, h_taps: slice, w_taps: slice) -> None:
        self._size = (h_taps.stop - h_taps.start, w_taps.stop - w_taps.start, *image.size)
        self._h = [*_axis_links(problem, 0, image.h, h_taps)]
        self._w = [*_axis_links(problem, 1, image.w, w_taps)] if self._h else []

    def __bool__(self) -> bool:
        """Whether there are any: else the columns are zeros."""
        return bool(self._w)

    def scatter(self, columns: Array, y: Array) -> None:
        """Add columns to the output pixels that they belong to.

        Args:
            columns: Shape ``(..., channels and taps, pixels)``.
            y: Shape ``(..., channels, h_O, w_O)``; modified.
        """
        by_axis = self._split_axes(columns, y)
        for h_taps, h_pixels, h_outputs in self._h:
            for w_taps, w_pixels, w_outputs in self._w:
                y[..., h_outputs, w_outputs] += by_axis[..., h_taps, h_pixels, w_taps, w_pixels]

    def gather(self, gy: Array, dtype: DType) -> Array:
        """Return columns with the output pixels that they belong to, and 0 outside the image.

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
    """Return the first tap that may link any of some inputs to an output, and the one behind the last, on one axis."""
    geometry = problem.geometry
    return _span(geometry.dilate[axis], geometry.stride[axis], pixels, problem, axis)


def linked_pixels(problem: Problem, axis: int, taps: slice) -> tuple[int, int]:
    """Return the first input that any of some taps may link, and the one behind the last: as `linked_taps`."""
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
    """Yield which of some inputs some taps link to which outputs, on one axis.

    Inputs and taps are counted from the first of them.
    """
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
    """Return which i of some have an output pixel ``step i + offset``, and those; None if there are none.

    The former are counted from the first of them.
    """
    first = max(some.start, -(offset // step))  # the least i with step i + offset >= 0
    last = min(some.stop - 1, (output - 1 - offset) // step)
    if last < first:
        return None
    outputs = slice(step * first + offset, step * last + offset + 1, step)
    return slice(first - some.start, last - some.start + 1), outputs
