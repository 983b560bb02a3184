"""The way that takes every problem: cuBLAS products with columns, cut into chunks so that the workspace is bounded.

With the pixels of all samples in one row, and x packed to (c_I, pixels):

    columns = W^T x, summed to y        gx = W columns(gy)        gW = x columns(gy)^T

for each group, where columns has a row for each output channel and tap (columns.cu). y is cut by samples and, where one
sample's columns are too many, by channels; gx and gW by pixels.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Generator, Iterator

import numpy as np

from deconvd.dtypes import DType
from deconvd.geometry import MAX_EXTENT
from deconvd.options import Options
from deconvd.problem import Problem
from deconvd_server.device.cuda.kernels.blas import (
    BLAS_WORKSPACE_BYTES,
    ComputeMode,
    Gemm,
    Matrices,
)
from deconvd_server.device.cuda.kernels.elementwise import cast_step
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
from deconvd_server.device.cuda.plan import Operation

__all__ = ["fallback", "fallback_kernels"]

_COLUMNS_BYTES = 64 << 20
"""A chunk's columns: about what the second-level cache of a large card holds, and enough to fill it with work."""

_THREADS = 256
_BLOCKS = 132 * 32
"""Blocks that keep a large card busy."""

_MAX_GRID_Y = 65535

_A, _B, _OUT = Place(Slot.A), Place(Slot.B), Place(Slot.OUT)


def fallback(operation: Operation, problem: Problem, options: Options) -> StepPlan:
    """Return the plan for any problem whose x and W have one element type.

    Its workspace is bounded: some hundred megabytes, or what one sample (for y: one channel of each
    group of it) or one pixel's columns (for gx and gW) take.
    """
    if not problem.has_products:
        result = {Operation.Y: problem.y, Operation.GX: problem.x, Operation.GW: problem.W}
        return StepPlan("gemm columns", 0, (Clear(_OUT, result[operation].nbytes),))
    chunks = _Chunks(problem, options)
    steps = {Operation.Y: chunks.y, Operation.GX: chunks.gx, Operation.GW: chunks.gW}
    made = tuple(steps[operation]())  # before the size is read: they lay out the workspace
    return StepPlan("gemm columns", chunks.workspace.size_bytes, made)


def fallback_kernels(dtype: DType) -> list[Kernel]:
    """Return the kernels that plans for an element type launch."""
    names = ("pack", "unpack", "gather_columns", "sum_columns")
    return [_kernel(name, dtype) for name in names]


class _Columns(ctypes.Structure):
    """`Columns` in columns.cu."""

    _fields_ = [
        (name, ctypes.c_int) for name in ("first_sample", "samples", "first_channel", "channels")
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
        problem, wide = self._problem, self._wide
        samples, channels = self._y_chunk()
        largest = problem.groups * channels * self._taps * samples * self._image_pixels
        columns = self.workspace.take(largest * wide.itemsize)
        packed = self._packed(samples * self._image_pixels)
        for first in range(0, problem.n, samples):
            count = min(samples, problem.n - first)
            x, leading = yield from self._pixels_of_x(
                first * self._image_pixels, count * self._image_pixels, packed
            )
            for channel in range(0, self._outputs, channels):
                yield from self._y_steps(
                    columns,
                    x,
                    leading,
                    (first, count),
                    (channel, min(channels, self._outputs - channel)),
                )

    def _y_chunk(self) -> tuple[int, int]:
        """Return how many samples, and how many channels of each group, are taken at once."""
        wide = self._wide
        channel = self._problem.groups * self._taps * self._image_pixels * wide.itemsize
        samples = max(_COLUMNS_BYTES // (channel * self._outputs), 1)
        channels = self._outputs if samples > 1 else max(_COLUMNS_BYTES // channel, 1)
        return min(samples, self._problem.n), min(channels, self._outputs)

    def _y_steps(
        self,
        columns: Place,
        x: Place,
        leading: int,
        samples: tuple[int, int],
        channels: tuple[int, int],
    ) -> Iterator[Step]:
        """Yield the steps for some samples and channels, each given as the first and how many."""
        problem, wide = self._problem, self._wide
        pixels, rows = samples[1] * self._image_pixels, channels[1] * self._taps
        W = _B.plus(channels[0] * self._taps * self._type.itemsize)
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
        blocks, rows, _ = _grid(threads, samples[1] * problem.groups * channels[1])
        # threads that take several rows find their taps only once
        grid = blocks, min(rows, -(-_BLOCKS // blocks)), 1
        chunk = _Columns(*samples, *channels)
        yield Launch(self._sum_kernel(threads), grid, (columns, _OUT), (self._geometry, chunk))

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
        narrow = max(reach, threads, math.prod(self._problem.image)) + _THREADS <= MAX_EXTENT
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
        wide = self._wide
        # Sums over chunks are kept in the compute type and rounded once.
        apart = len(ranges) > 1 and wide != self._type
        count = math.prod(self._problem.W.shape)
        total = self.workspace.take(count * wide.itemsize) if apart else _OUT
        total_type = wide if apart else self._type
        for first, pixels in ranges:
            x, leading = yield from self._pixels_of_x(first, pixels, packed)
            yield self._gather(columns, first, pixels, operand=_B)
            rows = self._W_leading
            yield self._gemm(
                (rows, self._inputs, pixels),
                Matrices(columns, self._type, pixels, rows * pixels, transposed=True),
                Matrices(x, self._type, leading, self._inputs * leading),
                Matrices(total, total_type, rows, self._inputs * rows),
                accumulate=first > 0,
            )
        if apart:
            yield cast_step(total, wide, _OUT, self._type, count)

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
        accumulate: bool = False,
    ) -> Step:
        return Gemm(*extents, self._problem.groups, a, b, out, self._mode, accumulate, self._blas)


def _kernel(name: str, dtype: DType) -> Kernel:
    return Kernel("columns.cu", name, (element(dtype),))


def _grid(pixels: int, rows: int) -> Grid:
    return -(-pixels // _THREADS), min(rows, _MAX_GRID_Y), 1


def _mode(dtype: DType, options: Options) -> ComputeMode:
    if dtype == np.dtype(np.float64):
        return ComputeMode.FLOAT64
    tf32 = options.allow_tf32 and dtype == np.dtype(np.float32)
    return ComputeMode.TF32 if tf32 else ComputeMode.FLOAT32
