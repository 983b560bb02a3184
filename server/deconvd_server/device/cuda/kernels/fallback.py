"""The way that takes every problem: cuBLAS products with columns, cut into chunks so that the workspace is bounded.

With the pixels of all samples in one row, and x packed to (c_I, pixels):

    columns = W^T x, summed to y        gx = W columns(gy)        gW = x columns(gy)^T

for each group, where columns has a row for each output channel and tap (columns.cu). y is cut by samples, where one
sample's columns are too many by channels, and where one channel's are, by pixels; gx and gW by pixels.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Generator, Iterator

import numpy as np

from deconvd.model.dtypes import DType
from deconvd.model.geometry import MAX_EXTENT
from deconvd.model.options import Options
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.blas import (
    BLAS_WORKSPACE_BYTES,
    ComputeMode,
    Gemm,
    Matrices,
)
from deconvd_server.device.cuda.kernels.geometry import KernelGeometry
from deconvd_server.device.cuda.kernels.launch import (
    Grid,
    Kernel,
    element,
    index,
    integer,
)
from deconvd_server.device.cuda.kernels.steps import (
    Clear,
    Launch,
    Place,
    Slot,
    Step,
    StepPlan,
    Workspace,
)
from deconvd_server.device.cuda.plan import Product

__all__ = ["fallback", "fallback_kernels"]

_COLUMNS_BYTES = 64 << 20
"""A chunk's columns: about what the second-level cache of a large card holds, and enough to fill it with work."""

_THREADS = 256
_BLOCKS = 132 * 32
"""Blocks that keep a large card busy."""

_MAX_GRID_Y = 65535

_FEW_GROUPS = 16
_MAX_PARTS = 32

_A, _B, _OUT = Place(Slot.A), Place(Slot.B), Place(Slot.OUT)


def fallback(operation: Product, problem: Problem, options: Options) -> StepPlan:
    """Return the plan for any problem whose x and W have one element type.

    Its workspace is bounded: some hundred megabytes, or what the columns of one pixel and, for y, the
    output image of one channel of each group take.
    """
    if not problem.has_products:
        result = {Product.Y: problem.y, Product.GX: problem.x, Product.GW: problem.W}
        return StepPlan("gemm columns", 0, (Clear(_OUT, result[operation].nbytes),))
    chunks = _Chunks(problem, options)
    steps = {Product.Y: chunks.y, Product.GX: chunks.gx, Product.GW: chunks.gW}
    made = tuple(steps[operation]())  # before the size is read: they lay out the workspace
    return StepPlan("gemm columns", chunks.workspace.size_bytes, made)


def fallback_kernels(dtype: DType) -> list[Kernel]:
    """Return the kernels that plans for an element type launch."""
    names = ("pack", "unpack", "gather_columns", "sum_columns", "add_parts")
    return [_kernel(name, dtype) for name in names]


class _Columns(ctypes.Structure):
    """`Columns` in columns.cu."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            *("first_sample", "samples", "first_channel", "channels", "first_pixel", "pixels"),
            *("begins", "ends"),
        )
    ]


class _Chunks:
    """Makes the steps of a plan, chunk by chunk, and lays out the workspace that the chunks share.

    Each of `y`, `gx` and `gW` is to be called once, on a new object.
    """

    def __init__(self, problem: Problem, options: Options) -> None:
        self.workspace = Workspace()
        self._problem = problem
        self._geometry = KernelGeometry.of(problem)
        self._type = problem.x.dtype
        self._wide = problem.compute_type
        self._mode = _mode(self._type, options)
        self._blas = self.workspace.take(BLAS_WORKSPACE_BYTES)
        self._image_pixels = math.prod(problem.image)
        self._taps = math.prod(problem.kernel)
        self._inputs = problem.c_I // problem.groups  # channels of a group
        self._outputs = problem.W.shape[1]

    def y(self) -> Iterator[Step]:
        """Yield the steps for y."""
        problem = self._problem
        samples, channels, pixels = self._y_chunk()
        chunk_elements = problem.groups * channels * self._taps * samples * pixels
        columns = self.workspace.take(chunk_elements * self._wide.itemsize)
        packed = self._packed(samples * pixels)
        whole = pixels == self._image_pixels
        planes = 0 if whole else problem.groups * channels  # whose sums so far must be kept
        totals = self.workspace.take(planes * math.prod(problem.output) * self._wide.itemsize)
        for first in range(0, problem.n, samples):
            for channel in range(0, self._outputs, channels):
                for pixel in range(0, self._image_pixels, pixels):
                    chunk = _Columns(
                        *(first, min(samples, problem.n - first)),
                        *(channel, min(channels, self._outputs - channel)),
                        *(pixel, min(pixels, self._image_pixels - pixel)),
                        *(pixel == 0, pixel + pixels >= self._image_pixels),
                    )
                    yield from self._y_steps(chunk, columns, totals, packed)

    def _y_chunk(self) -> tuple[int, int, int]:
        """Return how many samples, channels of each group, and pixels of each sample are taken at once.

        They are all but one of: several samples, some channels of one, some pixels of one channel.
        """
        pixel_bytes = self._problem.groups * self._taps * self._wide.itemsize
        channel_bytes = pixel_bytes * self._image_pixels
        samples = _between(1, _COLUMNS_BYTES // (channel_bytes * self._outputs), self._problem.n)
        channels = _between(1, _COLUMNS_BYTES // (channel_bytes * samples), self._outputs)
        fits = channel_bytes * samples * channels <= _COLUMNS_BYTES
        pixels = self._image_pixels if fits else max(_COLUMNS_BYTES // pixel_bytes, 1)
        return samples, channels, pixels

    def _y_steps(
        self, chunk: _Columns, columns: Place, totals: Place, packed: Place
    ) -> Iterator[Step]:
        """Yield the steps that compute the columns of a chunk and add them up."""
        problem, wide = self._problem, self._wide
        pixels, rows = chunk.samples * chunk.pixels, chunk.channels * self._taps
        first = chunk.first_sample * self._image_pixels + chunk.first_pixel
        x, leading = yield from self._pixels_of_x(first, pixels, packed)
        W = _B.plus(chunk.first_channel * self._taps * self._type.itemsize)
        yield self._gemm(
            (pixels, rows, self._inputs),
            Matrices(x, self._type, leading, self._inputs * leading),
            Matrices(
                W, self._type, self._W_leading, self._inputs * self._W_leading, transposed=True
            ),
            Matrices(columns, wide, pixels, rows * pixels),
        )
        # a thread for each pixel of each phase: rows are filled up to whole steps of the stride
        stride = problem.geometry.stride[1]
        threads = problem.output[0] * -(-problem.output[1] // stride) * stride
        blocks, planes, _ = _grid(threads, chunk.samples * problem.groups * chunk.channels)
        # threads that take several planes find their taps only once
        grid = blocks, min(planes, -(-_BLOCKS // blocks)), 1
        places = columns, totals, _OUT
        yield Launch(self._sum_kernel(threads), grid, places, (self._geometry, chunk))

    def _sum_kernel(self, threads: int) -> Kernel:
        """Return the kernel that sums columns: with 32-bit coordinates where they suffice."""
        geometry = self._problem.geometry
        reach = max(
            self._problem.output[i]
            + geometry.pad[i]
            + self._problem.kernel[i] * geometry.dilate[i]
            + geometry.stride[i]
            for i in range(2)
        )
        narrow = max(reach, threads, 2 * self._image_pixels) + _THREADS <= MAX_EXTENT
        return _kernel("sum_columns" if narrow else "sum_wide_columns", self._type)

    def gx(self) -> Iterator[Step]:
        """Yield the steps for gx."""
        chunk = self._pixel_chunk()
        columns = self._columns(chunk)
        packed = self._packed(chunk)
        for first, pixels in self._pixel_ranges(chunk):
            yield self._gather(columns, first, pixels)
            direct = self._problem.n == 1
            target = _OUT.plus(first * self._type.itemsize) if direct else packed
            leading = self._image_pixels if direct else pixels
            rows = self._W_leading
            yield self._gemm(
                (pixels, self._inputs, rows),
                Matrices(columns, self._type, pixels, rows * pixels),
                Matrices(_B, self._type, rows, self._inputs * rows),
                Matrices(target, self._type, leading, self._inputs * leading),
            )
            if not direct:
                yield self._move("unpack", packed, _OUT, first, pixels)

    def gW(self) -> Iterator[Step]:
        """Yield the steps for gW."""
        chunk = self._pixel_chunk()
        columns = self._columns(chunk)
        packed = self._packed(chunk)
        ranges = list(self._pixel_ranges(chunk))
        parts = self._parts(ranges)
        count = math.prod(self._problem.W.shape)
        sums_bytes = count * self._wide.itemsize
        # each part has sums of its own, unless there are so many that the memory would grow with them
        places_count = sum(parts) if sum(parts) * sums_bytes <= _COLUMNS_BYTES else 1
        whole = places_count == 1 and self._wide == self._type
        sums = _OUT if whole else self.workspace.take(places_count * sums_bytes)
        for number, (first, pixels) in enumerate(ranges):
            x, leading = yield from self._pixels_of_x(first, pixels, packed)
            yield self._gather(columns, first, pixels, operand=_B)
            shared = places_count == 1
            yield from self._gW_products(
                (columns, x, leading),
                pixels,
                sums if shared else sums.plus(sum(parts[:number]) * sums_bytes),
                parts[number],
                accumulate=shared and number > 0,
            )
        if not whole:
            constants = (index(count), integer(places_count))
            kernel = _kernel("add_parts", self._type)
            yield Launch(kernel, _grid(count, 1), (sums, _OUT), constants)

    def _parts(self, ranges: list[tuple[int, int]]) -> list[int]:
        """Return for each range of pixels into how many parts its sums are cut.

        cuBLAS cuts a deep product by itself, but not a batch of them: a few groups' small ones would
        leave most of the card idle.
        """
        count = math.prod(self._problem.W.shape)
        fit = _COLUMNS_BYTES // (len(ranges) * count * self._wide.itemsize)
        few = 1 < self._problem.groups <= _FEW_GROUPS
        most = min(_MAX_PARTS, fit) if few else 1
        return [_divisor(pixels, most) for _, pixels in ranges]

    def _gW_products(
        self,
        operands: tuple[Place, Place, int],
        pixels: int,
        sums: Place,
        parts_count: int,
        *,
        accumulate: bool,
    ) -> Iterator[Step]:
        """Yield the products for a range of pixels: of all groups at once, or of the parts of each.

        Args:
            operands: Columns, x, and the elements from one channel of x to the next.
        """
        columns, x, leading = operands
        count, rows = math.prod(self._problem.W.shape), self._W_leading
        if parts_count == 1:
            yield self._gemm(
                (rows, self._inputs, pixels),
                Matrices(columns, self._type, pixels, rows * pixels, transposed=True),
                Matrices(x, self._type, leading, self._inputs * leading),
                Matrices(sums, self._wide, rows, self._inputs * rows),
                accumulate=accumulate,
            )
            return
        part, itemsize = pixels // parts_count, self._type.itemsize
        for group in range(self._problem.groups):
            a = columns.plus(group * rows * pixels * itemsize)
            b = x.plus(group * self._inputs * leading * itemsize)
            out = sums.plus(group * self._inputs * rows * self._wide.itemsize)
            yield self._gemm(
                (rows, self._inputs, part),
                Matrices(a, self._type, pixels, part, transposed=True),
                Matrices(b, self._type, leading, part),
                Matrices(out, self._wide, rows, count),
                batch=parts_count,
            )

    @property
    def _W_leading(self) -> int:
        """Elements of W for one input channel: a row for each of its group's output channels and taps."""
        return self._outputs * self._taps

    def _pixel_chunk(self) -> int:
        """Return how many pixels' columns are taken at once."""
        pixel_bytes = self._problem.c_O * self._taps * self._type.itemsize
        fit = max(_COLUMNS_BYTES // pixel_bytes, 1)
        return min(fit // 64 * 64 or fit, self._problem.n * self._image_pixels)

    def _pixel_ranges(self, chunk: int) -> Iterator[tuple[int, int]]:
        """Yield the first pixel of each chunk and how many it has."""
        total = self._problem.n * self._image_pixels
        for first in range(0, total, chunk):
            yield first, min(chunk, total - first)

    def _columns(self, pixels: int) -> Place:
        return self.workspace.take(self._problem.c_O * self._taps * pixels * self._type.itemsize)

    def _packed(self, pixels: int) -> Place:
        """Return a place for packed pixels of x; a single sample lies packed already."""
        channels = self._problem.c_I if self._problem.n > 1 else 0
        return self.workspace.take(channels * pixels * self._type.itemsize)

    def _pixels_of_x(
        self, first: int, pixels: int, packed: Place
    ) -> Generator[Step, None, tuple[Place, int]]:
        """Yield what packs a range of x's pixels; return where they lie and how far its channels are apart."""
        if self._problem.n == 1:
            return _A.plus(first * self._type.itemsize), self._image_pixels
        yield self._move("pack", _A, packed, first, pixels)
        return packed, pixels

    def _gather(self, columns: Place, first: int, pixels: int, operand: Place = _A) -> Step:
        constants = (self._geometry, index(first), index(pixels))
        grid = _grid(pixels, self._problem.c_O)
        return Launch(_kernel("gather_columns", self._type), grid, (operand, columns), constants)

    def _move(self, name: str, source: Place, target: Place, first: int, pixels: int) -> Step:
        channels = self._problem.c_I
        constants = (
            integer(channels),
            index(self._image_pixels),
            index(first),
            index(pixels),
        )
        grid = _grid(pixels, channels)
        return Launch(_kernel(name, self._type), grid, (source, target), constants)

    def _gemm(
        self,
        extents: tuple[int, int, int],
        a: Matrices,
        b: Matrices,
        out: Matrices,
        *,
        batch: int | None = None,
        accumulate: bool = False,
    ) -> Step:
        batch = batch or self._problem.groups
        return Gemm(*extents, batch, a, b, out, self._mode, accumulate, self._blas)


def _kernel(name: str, dtype: DType) -> Kernel:
    return Kernel("columns.cu", name, (element(dtype),))


def _grid(pixels: int, rows: int) -> Grid:
    return -(-pixels // _THREADS), min(rows, _MAX_GRID_Y), 1


def _between(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))


def _divisor(count: int, most: int) -> int:
    """Return the largest power of two that divides `count` and is at most `most`; at least 1."""
    return min(count & -count, 1 << max(most, 1).bit_length() - 1)


def _mode(dtype: DType, options: Options) -> ComputeMode:
    if dtype == np.dtype(np.float64):
        return ComputeMode.FLOAT64
    tf32 = options.allow_tf32 and dtype == np.dtype(np.float32)
    return ComputeMode.TF32 if tf32 else ComputeMode.FLOAT32
