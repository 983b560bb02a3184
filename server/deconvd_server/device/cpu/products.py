"""The matrix products of a deconvolution, one block at a time.

With x, W and y split by group, and columns as in `columns`, for each group and each block of the input image:

    columns(y) = W^T x        gx = W columns(gy)        gW = sum of x columns(gy)^T over samples and blocks

Products are computed and summed in the problem's compute type. They are rounded once, when they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import Problem
from deconvd_server.call.context import CallContext
from deconvd_server.device.array_pieces import PIECE_ELEMENTS, copy_in_pieces
from deconvd_server.device.cpu.blocking import Blocking, ImageBlock
from deconvd_server.device.cpu.columns import TapLinks, linked_pixels, linked_taps
from deconvd_server.device.cpu.team import Task

__all__ = ["BlockProducts"]


class BlockProducts:
    """A problem's operands, split by group and ready for products.

    Each method returns one task. Tasks may run in any order and in any thread. A step of a task takes some ten
    milliseconds at most. It checks the call first, and raises as `CallContext.check` does.

    Args:
        x, W, b, gy: The operands that the methods to be called need.
    """

    def __init__(
        self,
        problem: Problem,
        blocking: Blocking,
        call: CallContext,
        *,
        x: Array | None = None,
        W: Array | None = None,
        b: Array | None = None,
        gy: Array | None = None,
    ) -> None:
        self._problem = problem
        self._blocking = blocking
        self._call = call
        self._type = problem.compute_type
        if x is not None:
            self._x = _split_groups(problem, x)
        if W is not None:
            if W.size <= PIECE_ELEMENTS:  # a larger W is cast block by block, to keep steps short
                # Messages may have W at an odd address. numpy would then copy a block of it for each product.
                W = np.require(W.astype(self._type, copy=False), requirements="A")
            self._W = _split_filter_groups(problem, W)
        self._b = None if b is None else b.reshape(problem.groups, -1, 1, 1)
        if gy is not None:
            self._gy = _split_groups(problem, gy)

    def set_y(self, y: Array, samples: slice, groups: slice, channels: slice) -> Task:
        """Set some output channels of some samples of y."""
        target = _split_groups(self._problem, y)[samples, groups, channels]
        # a narrower y would be rounded with each block that is added to it
        is_wide = target.dtype == self._type
        total = target if is_wide else np.empty(target.shape, self._type)
        yield from self._copy(total, 0 if self._b is None else self._b[groups, channels])
        for image in self._blocking.images():
            pixels = self._pixels(samples, groups, image)
            for h_taps, w_taps in self._taps(image):
                self._call.check()
                if links := TapLinks(self._problem, image, h_taps, w_taps):
                    W = self._filter(groups, channels, h_taps, w_taps)
                    links.scatter(np.matmul(W.swapaxes(1, 2), pixels), total)
                yield
        if not is_wide:
            yield from self._copy(target, total)

    def set_gx(self, gx: Array, samples: slice, groups: slice, image: ImageBlock) -> Task:
        """Set a block of the image in some samples of gx."""
        target = _split_groups(self._problem, gx)[samples, groups, :, image.h, image.w]
        total = np.zeros((*target.shape[:3], math.prod(image.size)), self._type)
        for channels in self._blocking.channels:
            for h_taps, w_taps in self._taps(image):
                self._call.check()
                if links := TapLinks(self._problem, image, h_taps, w_taps):
                    columns = self._columns(links, samples, groups, channels)
                    total += np.matmul(self._filter(groups, channels, h_taps, w_taps), columns)
                yield
        target[...] = total.reshape(target.shape)

    def add_to_gW(
        self,
        gW: Array,
        blocks: slice,
        groups: slice,
        channels: slice,
        h_taps: slice,
        w_taps: slice,
    ) -> Task:
        """Add the products of some samples' x and gy to a block of gW, which has the compute type.

        Args:
            blocks: The numbers of the blocks of samples.
        """
        target = _split_filter_groups(self._problem, gW)[groups, :, channels, h_taps, w_taps]
        for number in range(blocks.start, blocks.stop):
            samples = self._blocking.samples[number]
            for image in self._images(h_taps, w_taps):
                self._call.check()
                if links := TapLinks(self._problem, image, h_taps, w_taps):
                    columns = _join_samples(self._columns(links, samples, groups, channels))
                    pixels = _join_samples(self._pixels(samples, groups, image))
                    target += np.matmul(pixels, columns.swapaxes(1, 2)).reshape(target.shape)
                yield

    def tap_blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield the blocks of taps that may link any pixel of the image."""
        h_I, w_I = self._problem.image
        return self._taps(ImageBlock(slice(0, h_I), slice(0, w_I)))

    def _taps(self, image: ImageBlock) -> Iterator[tuple[slice, slice]]:
        """Yield the blocks of taps, without most of those that link no pixel of a block."""
        h = linked_taps(self._problem, 0, image.h)
        w = linked_taps(self._problem, 1, image.w)
        for h_taps in self._blocking.h_taps.cover(*h):
            for w_taps in self._blocking.w_taps.cover(*w):
                yield h_taps, w_taps

    def _images(self, h_taps: slice, w_taps: slice) -> Iterator[ImageBlock]:
        """Yield the blocks of the image, without most of those that a block of taps does not link."""
        h = linked_pixels(self._problem, 0, h_taps)
        w = linked_pixels(self._problem, 1, w_taps)
        for h_pixels in self._blocking.h_pixels.cover(*h):
            for w_pixels in self._blocking.w_pixels.cover(*w):
                yield ImageBlock(h_pixels, w_pixels)

    def _copy(self, target: Array, source: Array | int) -> Task:
        for _ in copy_in_pieces(target, source):
            self._call.check()
            yield

    def _pixels(self, samples: slice, groups: slice, image: ImageBlock) -> Array:
        """Return a block of x, of shape (samples, groups, c_I / groups, pixels)."""
        block = self._x[samples, groups, :, image.h, image.w].astype(self._type, copy=False)
        return block.reshape(*block.shape[:3], -1)

    def _columns(self, links: TapLinks, samples: slice, groups: slice, channels: slice) -> Array:
        """Return columns of gy, of shape (samples, groups, channels and taps, pixels)."""
        return links.gather(self._gy[samples, groups, channels], self._type)

    def _filter(self, groups: slice, channels: slice, h_taps: slice, w_taps: slice) -> Array:
        """Return a block of W, of shape (groups, c_I / groups, channels and taps)."""
        block = self._W[groups, :, channels, h_taps, w_taps].astype(self._type, copy=False)
        return block.reshape(*block.shape[:2], -1)


def _join_samples(blocks: Array) -> Array:
    """Return blocks (samples, groups, c, pixels) as (groups, c, all samples' pixels): one product sums over samples."""
    _, groups, c, _ = blocks.shape
    return blocks.transpose(1, 2, 0, 3).reshape(groups, c, -1)


def _split_groups(problem: Problem, images: Array) -> Array:
    """View images of shape (n, c, h, w) as (n, groups, c / groups, h, w)."""
    n, c, h, w = images.shape
    return images.reshape(n, problem.groups, c // problem.groups, h, w)


def _split_filter_groups(problem: Problem, W: Array) -> Array:
    """View W as (groups, c_I / groups, c_O / groups, h_K, w_K)."""
    c_I, *rest = W.shape
    return W.reshape(problem.groups, c_I // problem.groups, *rest)
