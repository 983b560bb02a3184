"""How a problem is cut into blocks whose columns stay in a core's cache, and into enough of them for all threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from deconvd.model.problem import Problem

__all__ = [
    "Blocking",
    "ImageBlock",
    "Ranges",
    "is_small",
    "working_elements_count",
]

_COLUMN_ELEMENTS = 1 << 18
"""Elements of one block's columns: 1 MiB of float32, what a core's second-level cache holds."""

_BLOCK_PRODUCTS = 1 << 29
"""Products of one block: some 20 ms, in which nobody looks whether the call is still wanted."""

_PIXEL_ELEMENTS = 1 << 22
"""Elements of x that a block of several samples takes: a few milliseconds, if they are to be cast."""

_IMAGE_PIXELS = 1 << 10
"""Pixels of an image block: enough for the matrix product to run at full speed."""

_LEAST_SHARE = 8
"""The part of a block's room below which another thread costs more than it saves."""

_LRU_ENTRIES_COUNT = 4096
"""Problems of which it is remembered whether they are small."""

_SMALL_ELEMENTS = _COLUMN_ELEMENTS // 4
_SMALL_PRODUCTS_COUNT = 1 << 20
_SMALL_OUTPUT_BYTES = 1 << 20
"""Columns, products for them and pixels of y: one thread is through with them sooner than others would have begun."""


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """A rectangle of the input image."""

    h: slice
    w: slice

    @property
    def size(self) -> tuple[int, int]:
        """Its height and width, in pixels."""
        return self.h.stop - self.h.start, self.w.stop - self.w.start


class Ranges:
    """The ranges of `step` that ``[0, length)`` is cut into.

    There may be any number of them, as a client wishes: none is made before it is asked for.

    Args:
        step: Is taken as 1 if it is less.
    """

    __slots__ = ("_length", "_starts", "_step")

    def __init__(self, length: int, step: int) -> None:
        self._length = length
        self._step = max(step, 1)
        self._starts = range(0, length, self._step)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, number: int) -> slice:
        start = self._starts[number]
        return slice(start, min(start + self._step, self._length))

    def __iter__(self) -> Iterator[slice]:
        return self.cover(0, self._length)

    def cover(self, first: int, last: int) -> Iterator[slice]:
        """Yield those that have anything from `first` to before `last`, which may be beyond them."""
        step, length = self._step, self._length
        first, last = max(first, 0), min(last, length)
        if first >= last:
            return
        for start in range(first - first % step, last, step):
            yield slice(start, min(start + step, length))


@dataclass(frozen=True, slots=True)
class Blocking:
    """Ranges of samples, groups, output channels in a group, taps and pixels.

    One of each makes a block. Its columns have at most about a million bytes, whatever the problem's size. Its taps are
    whole rows of the filter, or a part of one row.
    """

    samples: Ranges
    groups: Ranges
    channels: Ranges
    h_taps: Ranges
    w_taps: Ranges
    h_pixels: Ranges
    w_pixels: Ranges

    @classmethod
    def of(cls, problem: Problem, *, threads_count: int, sums_samples: bool = False) -> Blocking:
        """Return a blocking of a problem that has products.

        Args:
            threads_count: How many threads are to be kept busy.
            sums_samples: Whether a task sums over samples, so that they make no tasks themselves.
        """
        h_I, w_I = problem.image
        w_step = min(w_I, _IMAGE_PIXELS)
        h_step = min(h_I, _IMAGE_PIXELS // w_step)  # whole rows where they fit
        (h_K, w_K), channels = problem.kernel, problem.W.shape[1]
        taps = h_K * w_K
        fit = _fitting_elements_count(problem) // (h_step * w_step)
        parts_count = threads_count if sums_samples else -(-threads_count // problem.n)
        return cls(
            samples=Ranges(problem.n, _samples_step(problem, fit, threads_count)),
            groups=Ranges(
                problem.groups, min(fit // (taps * channels), problem.groups // parts_count)
            ),
            channels=Ranges(channels, min(fit // taps, channels * problem.groups // parts_count)),
            h_taps=Ranges(h_K, fit // w_K),
            w_taps=Ranges(w_K, fit),
            h_pixels=Ranges(h_I, h_step),
            w_pixels=Ranges(w_I, w_step),
        )

    def images(self) -> Iterator[ImageBlock]:
        """Yield the blocks of the input image, which cover it."""
        return (ImageBlock(h, w) for h in self.h_pixels for w in self.w_pixels)


def _fitting_elements_count(problem: Problem) -> int:
    """Return how many elements the columns of a block may have: few enough for the products that each takes."""
    return min(_COLUMN_ELEMENTS, _BLOCK_PRODUCTS // max(problem.c_I // problem.groups, 1))


def _samples_step(problem: Problem, fit: int, threads_count: int) -> int:
    """Return how many samples to take at once: several where each is small, but some for each thread.

    Args:
        fit: For how many (channel, tap) pairs a block has room.
    """
    pixels = min(math.prod(problem.image), _IMAGE_PIXELS)
    fitting = min(
        fit // (problem.c_O * math.prod(problem.kernel)),
        _PIXEL_ELEMENTS // (problem.c_I * pixels),
    )
    return max(min(fitting, -(-problem.n // threads_count)), fitting // _LEAST_SHARE)


@lru_cache(_LRU_ENTRIES_COUNT)
def is_small(problem: Problem) -> bool:
    """Return whether one thread is through with a problem sooner than it takes to have others help."""
    elements_count = problem.n * problem.c_O * math.prod(problem.kernel) * math.prod(problem.image)
    products_count = elements_count * problem.c_I // problem.groups
    return (
        elements_count <= _SMALL_ELEMENTS
        and products_count <= _SMALL_PRODUCTS_COUNT
        and problem.y.nbytes <= _SMALL_OUTPUT_BYTES
    )


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
