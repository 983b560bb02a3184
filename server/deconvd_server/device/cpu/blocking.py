"""How a problem is cut into blocks whose columns stay in a core's cache, and into enough of them for all threads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deconvd.problem import Problem

__all__ = ["Blocking", "ImageBlock", "ranges"]

_COLUMN_ELEMENTS = 1 << 18
"""Elements of one block's columns: 1 MiB of float32, what a core's second-level cache holds."""

_IMAGE_PIXELS = 1 << 10
"""Pixels of an image block: enough for the matrix product to run at full speed."""


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """A rectangle of the input image."""

    h: slice
    w: slice

    @property
    def size(self) -> tuple[int, int]:
        """Its height and width, in pixels."""
        return self.h.stop - self.h.start, self.w.stop - self.w.start


@dataclass(frozen=True, slots=True)
class Blocking:
    """Ranges of groups, of output channels in a group, of taps of the flattened filter, and of input pixels.

    One of each makes a block. Its columns have about a million bytes, whatever the problem's size.
    """

    groups: list[slice]
    channels: list[slice]
    taps: list[slice]
    images: list[ImageBlock]

    @classmethod
    def of(cls, problem: Problem, *, parts_count: int = 1) -> Blocking:
        """Return a blocking of `problem`.

        Args:
            parts_count: How many (groups, channels) ranges are wanted, if there are channels enough.
        """
        images = _image_blocks(problem)
        pixels = math.prod(images[0].size) if images else 1
        taps, channels = math.prod(problem.kernel), problem.W.shape[1]
        fit = _COLUMN_ELEMENTS // pixels
        return cls(
            groups=ranges(
                problem.groups, min(fit // max(taps * channels, 1), problem.groups // parts_count)
            ),
            channels=ranges(
                channels, min(fit // max(taps, 1), channels * problem.groups // parts_count)
            ),
            taps=ranges(taps, fit),
            images=images,
        )


def ranges(length: int, step: int) -> list[slice]:
    """Cut ``[0, length)`` into ranges of `step`, which is taken as 1 if it is less."""
    step = max(step, 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _image_blocks(problem: Problem) -> list[ImageBlock]:
    """Cover the input image: by whole rows where they fit."""
    h_I, w_I = problem.image
    w_step = min(w_I, _IMAGE_PIXELS)
    h_step = _IMAGE_PIXELS // max(w_step, 1)
    return [ImageBlock(h, w) for h in ranges(h_I, h_step) for w in ranges(w_I, w_step)]
