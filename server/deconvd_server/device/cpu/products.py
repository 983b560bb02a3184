"""The matrix products of a deconvolution, one block of it at a time.

With x, W, y split by group and columns as in `columns`, for each group and block of the input image:

    columns(y) = W^T x        gx = W columns(gy)        gW = sum of x columns(gy)^T over samples and blocks

Products are taken and summed in the problem's compute type and rounded once, when they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device.cpu.blocking import Blocking, ImageBlock
from deconvd_server.device.cpu.columns import gather, scatter

__all__ = ["Products"]


class Products:
    """A problem's operands, split by group and ready for products.

    Each method is one task, to be run in any order and thread; it looks at the call before each
    block and raises as `Call.check` does.

    Args:
        x, W, gy: Operands; those that the methods to be called do not need may be left out.
    """

    def __init__(
        self,
        problem: Problem,
        blocking: Blocking,
        call: Call,
        *,
        x: Array | None = None,
        W: Array | None = None,
        gy: Array | None = None,
    ) -> None:
        self._problem = problem
        self._blocking = blocking
        self._call = call
        self._type = problem.compute_type
        if x is not None:
            self._x = _by_group(problem, x)
        if W is not None:
            # aligned, which messages need not have it: else each product would copy what it takes of it
            typed = _filter_by_group(problem, W).astype(self._type, copy=False)
            self._W: Array = np.require(typed, requirements="A")
        if gy is not None:
            self._gy = _by_group(problem, gy)

    def add_to_y(self, y: Array, samples: slice, groups: slice, channels: slice) -> None:
        """Add the products of x and W to some output channels of some samples."""
        target = _by_group(self._problem, y)[samples, groups, channels]
        total = target.astype(self._type)
        for image in self._blocking.images:
            pixels = self._pixels(samples, groups, image)
            for taps in self._blocking.taps:
                self._call.check()
                W = _matrix(self._W[groups, :, channels, taps])
                columns = np.matmul(W.swapaxes(1, 2), pixels)
                shape = (*target.shape[:3], -1, *image.size)
                scatter(self._problem, image, taps, columns.reshape(shape), total)
        target[...] = total

    def set_gx(self, gx: Array, samples: slice, groups: slice, image: ImageBlock) -> None:
        """Set a block of the image in some samples of gx."""
        target = _by_group(self._problem, gx)[samples, groups, :, image.h, image.w]
        total = np.zeros((*target.shape[:3], math.prod(image.size)), self._type)
        for channels in self._blocking.channels:
            for taps in self._blocking.taps:
                columns = self._columns(samples, groups, channels, taps, image)
                total += np.matmul(_matrix(self._W[groups, :, channels, taps]), columns)
        target[...] = total.reshape(target.shape)

    def add_to_gW(
        self, gW: Array, samples: Sequence[slice], groups: slice, channels: slice, taps: slice
    ) -> None:
        """Add the products of some samples' x and gy to a block of gW, which has the compute type."""
        target = _filter_by_group(self._problem, gW)[groups, :, channels, taps]
        for several in samples:
            for image in self._blocking.images:
                columns = _side_by_side(self._columns(several, groups, channels, taps, image))
                pixels = _side_by_side(self._pixels(several, groups, image))
                target += np.matmul(pixels, columns.swapaxes(1, 2)).reshape(target.shape)

    def _pixels(self, samples: slice, groups: slice, image: ImageBlock) -> Array:
        """Return a block of x, of shape (samples, groups, c_I / groups, pixels)."""
        block = self._x[samples, groups, :, image.h, image.w].astype(self._type, copy=False)
        return block.reshape(*block.shape[:3], -1)

    def _columns(
        self, samples: slice, groups: slice, channels: slice, taps: slice, image: ImageBlock
    ) -> Array:
        """Return columns of gy, of shape (samples, groups, channels and taps, pixels)."""
        self._call.check()
        gy = self._gy[samples, groups, channels]
        columns = np.empty((*gy.shape[:3], taps.stop - taps.start, *image.size), self._type)
        gather(self._problem, image, taps, gy, columns)
        return columns.reshape(*gy.shape[:2], -1, math.prod(image.size))


def _side_by_side(blocks: Array) -> Array:
    """Return blocks (samples, groups, c, pixels) as (groups, c, all samples' pixels), which a product sums over."""
    _, groups, c, _ = blocks.shape
    return blocks.transpose(1, 2, 0, 3).reshape(groups, c, -1)


def _by_group(problem: Problem, images: Array) -> Array:
    """View images of shape (n, c, h, w) as (n, groups, c / groups, h, w)."""
    n, c, h, w = images.shape
    return images.reshape(n, problem.groups, c // problem.groups, h, w)


def _filter_by_group(problem: Problem, W: Array) -> Array:
    """View W as (groups, c_I / groups, c_O / groups, taps)."""
    c_I, channels, h_K, w_K = W.shape
    return W.reshape(problem.groups, c_I // problem.groups, channels, h_K * w_K)


def _matrix(W: Array) -> Array:
    """View a block of W as (groups, c_I / groups, channels and taps)."""
    return W.reshape(*W.shape[:2], -1)
