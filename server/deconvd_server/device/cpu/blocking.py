"""How a problem is cut into blocks whose columns stay in a core's cache, and into enough of them for all threads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deconvd.problem import Problem

__all__ = [
    "Blocking",
    "ImageBlock",
    "ranges",
    "useful_threads_count",
    "working_elements_count",
]

_COLUMN_ELEMENTS = 1 << 18
"""Elements of one block's columns: 1 MiB of float32, what a core's second-level cache holds."""

_IMAGE_PIXELS = 1 << 10
"""Pixels of an image block: enough for the matrix product to run at full speed."""

_LEAST_SHARE = 8
"""The part of a block's room below which another thread costs more than it saves."""

_SMALL_ELEMENTS = _COLUMN_ELEMENTS // 4
_SMALL_PRODUCTS_COUNT = 1 << 20
"""Columns, and products for them, that one thread is through with sooner than it takes to have others help."""


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
    """Ranges of samples, groups, output channels in a group, taps of the flattened filter, and pixels.

    One of each makes a block. Its columns have about a million bytes, whatever the problem's size.
    """

    samples: list[slice]
    groups: list[slice]
    channels: list[slice]
    taps: list[slice]
    images: list[ImageBlock]

    @classmethod
    def of(cls, problem: Problem, *, threads_count: int, sums_samples: bool = False) -> Blocking:
        """Return a blocking of a problem that has products.

        Args:
            threads_count: How many threads are to be kept busy.
            sums_samples: Whether a task sums over samples, so that they make no tasks themselves.
        """
        images = _image_blocks(problem)
        taps, channels = math.prod(problem.kernel), problem.W.shape[1]
        fit = _COLUMN_ELEMENTS // math.prod(images[0].size)
        parts_count = threads_count if sums_samples else -(-threads_count // problem.n)
        return cls(
            samples=ranges(problem.n, _samples_step(problem, fit, threads_count)),
            groups=ranges(
                problem.groups, min(fit // (taps * channels), problem.groups // parts_count)
            ),
            channels=ranges(channels, min(fit // taps, channels * problem.groups // parts_count)),
            taps=ranges(taps, fit),
            images=images,
        )


def _samples_step(problem: Problem, fit: int, threads_count: int) -> int:
    """Return how many samples to take at once: several where each is small, but some for each thread.

    Args:
        fit: For how many (channel, tap) pairs a block has room.
    """
    fitting = fit // (problem.c_O * math.prod(problem.kernel))
    return max(min(fitting, -(-problem.n // threads_count)), fitting // _LEAST_SHARE)


def useful_threads_count(problem: Problem, threads_count: int) -> int:
    """Return how many of some threads are worth their while: one for a small problem, all for another."""
    elements_count = problem.n * problem.c_O * math.prod(problem.kernel) * math.prod(problem.image)
    products_count = elements_count * problem.c_I // problem.groups
    is_small = elements_count <= _SMALL_ELEMENTS and products_count <= _SMALL_PRODUCTS_COUNT
    return 1 if is_small else threads_count


def working_elements_count(problem: Problem) -> int:
    """Return a bound on what a task works on at once: columns and pixels of a block, and a copy of each.

    It makes no blocking: a problem of which only a description was sent may have any number of blocks.
    """
    if not problem.has_products:
        return 0
    pixels = min(math.prod(problem.image), _IMAGE_PIXELS)
    columns = problem.c_O * math.prod(problem.kernel) * pixels
    samples = min(max(_COLUMN_ELEMENTS // columns, 1), problem.n)
    return 2 * (min(samples * columns, _COLUMN_ELEMENTS) + samples * problem.c_I * pixels)


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
