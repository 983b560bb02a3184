"""Blocking: a problem is cut into blocks whose columns stay in a core's cache, and into enough tasks for all threads.

A block is one range of each axis. Its columns are the matrix that `columns` gathers or scatters:

                                pixels of the image block
                               +-------------------------+
    samples x groups x         |                         |
    (output channels x taps)   |  at most 1 MiB float32  |
                               +-------------------------+

A task does the blocks of some ranges one after the other, so that no two tasks write the same output:

    y     a task has samples, groups and channels       and goes over images and taps
    gx    a task has samples, groups and an image       and goes over channels and taps
    gW    a task has groups, channels and taps,         and goes over samples and images
          and if those are too few, a part of the samples with a sum of its own
"""

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
"""Elements of one block's columns: 1 MiB of float32, which a core's second-level cache holds."""

_BLOCK_PRODUCTS = 1 << 29
"""Products of one block: some 20 ms, during which the call is not checked."""

_PIXEL_ELEMENTS = 1 << 22
"""Elements of x in a block of several samples. If they must be cast, that takes a few milliseconds."""

_IMAGE_PIXELS = 1 << 10
"""Pixels of an image block: enough for the matrix product to run at full speed."""

_LEAST_SHARE = 8
"""A block is not made smaller than this part of its room, to give more threads a block: they would cost more than they
save."""

_LRU_ENTRIES_COUNT = 4096
"""Problems for which the result of `is_small` is remembered."""

_SMALL_ELEMENTS = _COLUMN_ELEMENTS // 4
"""Columns of a problem that one thread computes sooner than other threads would have started."""

_SMALL_PRODUCTS_COUNT = 1 << 20
"""Products of such a problem."""

_SMALL_OUTPUT_BYTES = 1 << 20
"""Size of the y of such a problem."""


@dataclass(frozen=True, slots=True)
class ImageBlock:
    """A rectangle of the input image."""

    h: slice
    w: slice

    @property
    def size(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return self.h.stop - self.h.start, self.w.stop - self.w.start


class Ranges:
    """The ranges of length `step` that ``[0, length)`` is cut into.

    Each range is made when it is asked for: a client's problem may have any number of them.

    Args:
        step: Taken as 1 if it is less.
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
        """Yield the ranges that overlap ``[first, last)``, which may reach beyond ``[0, length)``."""
        step, length = self._step, self._length
        first, last = max(first, 0), min(last, length)
        if first >= last:
            return
        for start in range(first - first % step, last, step):
            yield slice(start, min(start + step, length))


@dataclass(frozen=True, slots=True)
class Blocking:
    """The ranges of samples, groups, output channels in a group, taps and pixels. One of each makes a block.

    A block's columns have at most about a million bytes, whatever the problem's size. Its taps are whole rows of the
    filter, or a part of one row; its pixels likewise.
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
            threads_count: Threads to keep busy.
            sums_samples: Whether each task sums over samples, so that samples do not make more tasks.
        """
        h_I, w_I = problem.image
        w_step = min(w_I, _IMAGE_PIXELS)
        h_step = min(h_I, _IMAGE_PIXELS // w_step)  # whole rows where they fit
        (h_K, w_K), channels = problem.kernel, problem.W.shape[1]
        taps = h_K * w_K
        fit = _fitting_elements_count(problem) // (h_step * w_step)  # (channel, tap) pairs
        # Room is filled from the inside out: taps first, then channels, groups and samples. Where samples do not make a
        # task for each thread, groups and channels are cut into that many parts.
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
    """Return the most elements that the columns of a block may have: fewer if each takes many products."""
    return min(_COLUMN_ELEMENTS, _BLOCK_PRODUCTS // max(problem.c_I // problem.groups, 1))


def _samples_step(problem: Problem, fit: int, threads_count: int) -> int:
    """Return the samples of a block: several if each is small, but not so many that a thread gets none.

    Args:
        fit: The (channel, tap) pairs that a block has room for.
    """
    pixels = min(math.prod(problem.image), _IMAGE_PIXELS)
    fitting = min(
        fit // (problem.c_O * math.prod(problem.kernel)),
        _PIXEL_ELEMENTS // (problem.c_I * pixels),
    )
    return max(min(fitting, -(-problem.n // threads_count)), fitting // _LEAST_SHARE)


@lru_cache(_LRU_ENTRIES_COUNT)
def is_small(problem: Problem) -> bool:
    """Return whether one thread computes a problem sooner than other threads would have started to help."""
    elements_count = problem.n * problem.c_O * math.prod(problem.kernel) * math.prod(problem.image)
    products_count = elements_count * problem.c_I // problem.groups
    return (
        elements_count <= _SMALL_ELEMENTS
        and products_count <= _SMALL_PRODUCTS_COUNT
        and problem.y.nbytes <= _SMALL_OUTPUT_BYTES
    )


def working_elements_count(problem: Problem) -> int:
    """Return a bound on the elements that a task holds at once: columns and pixels of a block, and a copy of each.

    It makes no `Blocking`: this is asked before a call is admitted, of any problem that a client describes.
    """
    if not problem.has_products:
        return 0
    pixels = min(math.prod(problem.image), _IMAGE_PIXELS)
    columns = problem.c_O * math.prod(problem.kernel) * pixels
    samples = min(max(_COLUMN_ELEMENTS // columns, 1), problem.n)
    return 2 * (min(samples * columns, _COLUMN_ELEMENTS) + samples * problem.c_I * pixels)
