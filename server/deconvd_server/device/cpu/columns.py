"""Columns: what each tap of the filter adds to the output image, for a block of the input image.

Columns have the shape (samples, groups, channels, taps, h, w): for each pixel of the block and each tap, one value of
an output channel. A matrix product turns x and W into columns and `scatter` adds those to y (col2im); `gather` is its
adjoint and takes columns from gy (im2col), whose products with W and x are gx and gW. On each axis, tap k links input
pixel i to output pixel s i + d k - p.
"""

from __future__ import annotations

from collections.abc import Iterator

from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.device.cpu.blocking import ImageBlock

__all__ = ["gather", "scatter"]


def scatter(problem: Problem, image: ImageBlock, taps: slice, columns: Array, y: Array) -> None:
    """Add columns to the output pixels that they belong to.

    Args:
        columns: Shape ``(..., taps, h, w)``.
        y: Shape ``(..., h_O, w_O)``; modified.
    """
    for tap, pixels, target in _links(problem, image, taps):
        y[..., *target] += columns[..., tap, *pixels]


def gather(problem: Problem, image: ImageBlock, taps: slice, gy: Array, columns: Array) -> None:
    """Set columns to the output pixels that they belong to, and to 0 outside the image.

    Args:
        gy: Shape ``(..., h_O, w_O)``.
        columns: Shape ``(..., taps, h, w)``; overwritten.
    """
    columns.fill(0)
    for tap, pixels, source in _links(problem, image, taps):
        columns[..., tap, *pixels] = gy[..., *source]


_Index = tuple[slice, slice]


def _links(
    problem: Problem, image: ImageBlock, taps: slice
) -> Iterator[tuple[int, _Index, _Index]]:
    """Yield for each tap its place in the block, the pixels of the block that it links, and to which.

    Taps that reach no output pixel are left out.
    """
    w_K = problem.kernel[1]
    h_links = _AxisLinks(problem, 0, image.h)
    w_links = _AxisLinks(problem, 1, image.w)
    for tap in range(taps.start, taps.stop):
        h, w = h_links.of_tap(tap // w_K), w_links.of_tap(tap % w_K)
        if h is not None and w is not None:
            yield tap - taps.start, (h[0], w[0]), (h[1], w[1])


class _AxisLinks:
    """Which input and output pixels of one axis the taps link, for a range of inputs."""

    def __init__(self, problem: Problem, axis: int, inputs: slice) -> None:
        self._stride = problem.geometry.stride[axis]
        self._pad = problem.geometry.pad[axis]
        self._dilate = problem.geometry.dilate[axis]
        self._output = problem.output[axis]
        self._start, self._stop = inputs.start, inputs.stop

    def of_tap(self, tap: int) -> tuple[slice, slice] | None:
        """Return the linked inputs, counted from the range's start, and outputs; None if there are none."""
        s, offset = self._stride, self._dilate * tap - self._pad
        first = max(self._start, -(offset // s))  # the least i with s i + offset >= 0
        last = min(self._stop - 1, (self._output - 1 - offset) // s)
        if last < first:
            return None
        inputs = slice(first - self._start, last - self._start + 1)
        return inputs, slice(s * first + offset, s * last + offset + 1, s)
