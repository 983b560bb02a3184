"""The fallback, a plan for every problem: cuBLAS products with columns, in chunks so that the workspace is bounded.

With the pixels of all samples in one row, and x packed to (c_I, pixels):

    columns = W^T x, summed to y        gx = W columns(gy)        gW = x columns(gy)^T

for each group, where columns has a row for each output channel and tap (columns.cu).

A chunk of y has some samples. If one sample's columns are too many, it has some of its channels. If one channel's
columns are too many, it has some of its pixels. A chunk of gx and gW has some pixels.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import numpy as np

from deconvd.model.dtypes import DType
from deconvd.model.geometry import MAX_EXTENT
from deconvd.model.options import Options, UseCudnnTensorCore
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.blas import (
    BLAS_WORKSPACE_BYTES,
    ComputeMode,
    Gemm,
    Matrices,
)
from deconvd_server.device.cuda.kernels.geometry import kernel_geometry
from deconvd_server.device.cuda.kernels.launch import (
    THREADS,
    Grid,
    Kernel,
    element,
    index,
    integer,
)
from deconvd_server.device.cuda.kernels.steps import (
    BufferOffset,
    BufferSlot,
    Clear,
    Launch,
    PlanStep,
    StepPlan,
    Workspace,
)
from deconvd_server.device.cuda.kernels.structs import Columns
from deconvd_server.device.cuda.plan import Product

__all__ = ["fallback", "fallback_kernels"]

_COLUMNS_BYTES = 64 << 20
"""Size of a chunk's columns: about a large card's second-level cache, and enough work to fill the card."""

_BLOCKS_PER_PROCESSOR = 32
"""Blocks for each multiprocessor that keep a card busy."""

_MAX_GRID_Y = 65535
"""The most blocks of a grid along y, by CUDA."""

_FEW_GROUPS = 16
"""The most groups whose products for gW are cut into parts."""

_MAX_PARTS = 32
"""The most parts of such a product."""

_A, _B, _OUT = BufferOffset(BufferSlot.A), BufferOffset(BufferSlot.B), BufferOffset(BufferSlot.OUT)


def fallback(
    product: Product, problem: Problem, options: Options, processors_count: int
) -> StepPlan:
    """Return the plan for any problem whose x and W have one element type.

    Its workspace has some hundred megabytes at most, or the size of the columns of one pixel and, for y, of the output
    image of one channel of each group, if those are larger.

    Args:
        processors_count: Multiprocessors of the card that the plan is for. Results and workspace do not depend on it.
    """
    if not problem.has_products:
        result = {Product.Y: problem.y, Product.GX: problem.x, Product.GW: problem.W}
        return StepPlan("gemm columns", 0, (Clear(_OUT, result[product].nbytes),))
    chunks = _Chunks(problem, options, processors_count)
    steps = {Product.Y: chunks.y, Product.GX: chunks.gx, Product.GW: chunks.gW}
    made = tuple(steps[product]())  # before the size is read: they lay out the workspace
    return StepPlan("gemm columns", chunks.workspace.size_bytes, made)


def fallback_kernels(dtype: DType) -> list[Kernel]:
    """Return the kernels that the fallback launches for an element type."""
    names = ("pack", "unpack", "gather_columns", "sum_columns", "add_parts")
    return [_kernel(name, dtype) for name in names]


class _Chunks:
    """Makes the steps of a plan, chunk by chunk, and lays out the workspace that the chunks share.

    Only one of `y`, `gx` and `gW` may be called on an object, and only once.
    """

    def __init__(self, problem: Problem, options: Options, processors_count: int) -> None:
        self._blocks_count = processors_count * _BLOCKS_PER_PROCESSOR
        self.workspace = Workspace()
        self._problem = problem
        self._geometry = kernel_geometry(problem)
        self._type = problem.x.dtype
        self._wide = problem.compute_type
        self._mode = _mode(self._type, options)
        self._blas = self.workspace.take(BLAS_WORKSPACE_BYTES)
        self._image_pixels = math.prod(problem.image)
        self._taps = math.prod(problem.kernel)
        self._inputs = problem.c_I // problem.groups  # channels of a group
        self._outputs = problem.W.shape[1]

    def y(self) -> Iterator[PlanStep]:
        """Yield the steps for y."""
        problem = self._problem
        samples, channels, pixels = self._y_chunk()
        chunk_elements = problem.groups * channels * self._taps * samples * pixels
        columns = self.workspace.take(chunk_elements * self._wide.itemsize)
        packed = self._take_packed(samples * pixels)
        whole = pixels == self._image_pixels
        planes = (
            0 if whole else problem.groups * channels
        )  # their sums are kept from chunk to chunk
        totals = self.workspace.take(planes * math.prod(problem.output) * self._wide.itemsize)
        for first in range(0, problem.n, samples):
            for channel in range(0, self._outputs, channels):
                for pixel in range(0, self._image_pixels, pixels):
                    chunk = Columns(
                        *(first, min(samples, problem.n - first)),
                        *(channel, min(channels, self._outputs - channel)),
                        *(pixel, min(pixels, self._image_pixels - pixel)),
                        *(pixel == 0, pixel + pixels >= self._image_pixels),
                    )
                    yield from self._y_steps(chunk, columns, totals, packed)

    def _y_chunk(self) -> tuple[int, int, int]:
        """Return the samples, the channels of each group, and the pixels of each sample in a chunk.

        That is several whole samples, or some channels of one sample, or some pixels of one channel.
        """
        pixel_bytes = self._problem.groups * self._taps * self._wide.itemsize
        channel_bytes = pixel_bytes * self._image_pixels
        samples = _clamp(1, _COLUMNS_BYTES // (channel_bytes * self._outputs), self._problem.n)
        channels = _clamp(1, _COLUMNS_BYTES // (channel_bytes * samples), self._outputs)
        fits = channel_bytes * samples * channels <= _COLUMNS_BYTES
        pixels = self._image_pixels if fits else max(_COLUMNS_BYTES // pixel_bytes, 1)
        return samples, channels, pixels

    def _y_steps(
        self, chunk: Columns, columns: BufferOffset, totals: BufferOffset, packed: BufferOffset
    ) -> Iterator[PlanStep]:
        """Yield the steps that compute the columns of a chunk and sum them to y."""
        problem, wide = self._problem, self._wide
        pixels, rows = chunk.samples * chunk.pixels, chunk.channels * self._taps
        first = chunk.first_sample * self._image_pixels + chunk.first_pixel
        x, leading = yield from self._pixels_of_x(first, pixels, packed)
        W = _B.advance(chunk.first_channel * self._taps * self._type.itemsize)
        yield self._gemm(
            (pixels, rows, self._inputs),
            Matrices(x, self._type, leading, self._inputs * leading),
            Matrices(
                W, self._type, self._W_leading, self._inputs * self._W_leading, transposed=True
            ),
            Matrices(columns, wide, pixels, rows * pixels),
        )
        # a thread for each output pixel, ordered by phase; rows are rounded up to a multiple of the stride
        stride = problem.geometry.stride[1]
        threads = problem.output[0] * -(-problem.output[1] // stride) * stride
        blocks, planes, _ = _grid(threads, chunk.samples * problem.groups * chunk.channels)
        # a thread that takes several planes finds its taps only once
        grid = blocks, min(planes, -(-self._blocks_count // blocks)), 1
        places = columns, totals, _OUT
        yield Launch(self._sum_kernel(threads), grid, places, (self._geometry, chunk))

    def _sum_kernel(self, threads: int) -> Kernel:
        """Return the kernel that sums columns: with 32-bit coordinates if they suffice."""
        geometry = self._problem.geometry
        reach = max(
            self._problem.output[i]
            + geometry.pad[i]
            + self._problem.kernel[i] * geometry.dilate[i]
            + geometry.stride[i]
            for i in range(2)
        )
        narrow = max(reach, threads, 2 * self._image_pixels) + THREADS <= MAX_EXTENT
        return _kernel("sum_columns" if narrow else "sum_wide_columns", self._type)

    def gx(self) -> Iterator[PlanStep]:
        """Yield the steps for gx."""
        chunk = self._pixel_chunk()
        columns = self._take_columns(chunk)
        packed = self._take_packed(chunk)
        for first, pixels in self._pixel_ranges(chunk):
            yield self._gather(columns, first, pixels)
            direct = self._problem.n == 1
            target = _OUT.advance(first * self._type.itemsize) if direct else packed
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

    def gW(self) -> Iterator[PlanStep]:
        """Yield the steps for gW."""
        chunk = self._pixel_chunk()
        columns = self._take_columns(chunk)
        packed = self._take_packed(chunk)
        ranges = list(self._pixel_ranges(chunk))
        parts = self._parts(ranges)
        count = math.prod(self._problem.W.shape)
        sums_bytes = count * self._wide.itemsize
        # Each part has sums of its own, unless they would need too much memory. Then all parts accumulate in one.
        sums_count = sum(parts) if sum(parts) * sums_bytes <= _COLUMNS_BYTES else 1
        whole = sums_count == 1 and self._wide == self._type
        sums = _OUT if whole else self.workspace.take(sums_count * sums_bytes)
        for number, (first, pixels) in enumerate(ranges):
            x, leading = yield from self._pixels_of_x(first, pixels, packed)
            yield self._gather(columns, first, pixels, operand=_B)
            shared = sums_count == 1
            yield from self._gW_products(
                (columns, x, leading),
                pixels,
                sums if shared else sums.advance(sum(parts[:number]) * sums_bytes),
                parts[number],
                accumulate=shared and number > 0,
            )
        if not whole:
            constants = (index(count), integer(sums_count))
            kernel = _kernel("add_parts", self._type)
            yield Launch(kernel, _grid(count, 1), (sums, _OUT), constants)

    def _parts(self, ranges: list[tuple[int, int]]) -> list[int]:
        """Return the number of parts of the sums of each range of pixels.

        cuBLAS cuts one deep product into parts by itself, but not a batch of products. With a few groups, their small
        products would leave most of the card idle.
        """
        count = math.prod(self._problem.W.shape)
        fit = _COLUMNS_BYTES // (len(ranges) * count * self._wide.itemsize)
        few = 1 < self._problem.groups <= _FEW_GROUPS
        most = min(_MAX_PARTS, fit) if few else 1
        return [_divisor(pixels, most) for _, pixels in ranges]

    def _gW_products(
        self,
        operands: tuple[BufferOffset, BufferOffset, int],
        pixels: int,
        sums: BufferOffset,
        parts_count: int,
        *,
        accumulate: bool,
    ) -> Iterator[PlanStep]:
        """Yield the products for a range of pixels: of all groups in one batch, or of the parts of each group.

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
            a = columns.advance(group * rows * pixels * itemsize)
            b = x.advance(group * self._inputs * leading * itemsize)
            out = sums.advance(group * self._inputs * rows * self._wide.itemsize)
            yield self._gemm(
                (rows, self._inputs, part),
                Matrices(a, self._type, pixels, part, transposed=True),
                Matrices(b, self._type, leading, part),
                Matrices(out, self._wide, rows, count),
                batch=parts_count,
            )

    @property
    def _W_leading(self) -> int:
        """Elements of W for one input channel: one for each output channel of its group and each tap."""
        return self._outputs * self._taps

    def _pixel_chunk(self) -> int:
        """Return the pixels in a chunk of gx or gW: a multiple of 64 if there is room."""
        pixel_bytes = self._problem.c_O * self._taps * self._type.itemsize
        fit = max(_COLUMNS_BYTES // pixel_bytes, 1)
        return min(fit // 64 * 64 or fit, self._problem.n * self._image_pixels)

    def _pixel_ranges(self, chunk: int) -> Iterator[tuple[int, int]]:
        """Yield the first pixel of each chunk, and its number of pixels."""
        total = self._problem.n * self._image_pixels
        for first in range(0, total, chunk):
            yield first, min(chunk, total - first)

    def _take_columns(self, pixels: int) -> BufferOffset:
        return self.workspace.take(self._problem.c_O * self._taps * pixels * self._type.itemsize)

    def _take_packed(self, pixels: int) -> BufferOffset:
        """Return a region for packed pixels of x or gx. It is empty for a single sample, which is packed already."""
        channels = self._problem.c_I if self._problem.n > 1 else 0
        return self.workspace.take(channels * pixels * self._type.itemsize)

    def _pixels_of_x(
        self, first: int, pixels: int, packed: BufferOffset
    ) -> Generator[PlanStep, None, tuple[BufferOffset, int]]:
        """Yield the step that packs a range of x's pixels, if it needs one.

        Return where they are, and the elements from one channel to the next.
        """
        if self._problem.n == 1:
            return _A.advance(first * self._type.itemsize), self._image_pixels
        yield self._move("pack", _A, packed, first, pixels)
        return packed, pixels

    def _gather(
        self, columns: BufferOffset, first: int, pixels: int, operand: BufferOffset = _A
    ) -> PlanStep:
        constants = (self._geometry, index(first), index(pixels))
        grid = _grid(pixels, self._problem.c_O)
        return Launch(_kernel("gather_columns", self._type), grid, (operand, columns), constants)

    def _move(
        self, name: str, source: BufferOffset, target: BufferOffset, first: int, pixels: int
    ) -> PlanStep:
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
    ) -> PlanStep:
        batch = batch or self._problem.groups
        return Gemm(*extents, batch, a, b, out, self._mode, accumulate, self._blas)


def _kernel(name: str, dtype: DType) -> Kernel:
    return Kernel("columns.cu", name, (element(dtype),))


def _grid(pixels: int, rows: int) -> Grid:
    return -(-pixels // THREADS), min(rows, _MAX_GRID_Y), 1


def _clamp(least: int, value: int, most: int) -> int:
    return max(least, min(value, most))


def _divisor(count: int, most: int) -> int:
    """Return the largest power of two that divides `count` and is at most `most`; at least 1."""
    return min(count & -count, 1 << max(most, 1).bit_length() - 1)


def _mode(dtype: DType, options: Options) -> ComputeMode:
    if options.use_cudnn_tensor_core is UseCudnnTensorCore.NEVER:
        is_float64 = dtype == np.dtype(np.float64)
        return ComputeMode.PLAIN_FLOAT64 if is_float64 else ComputeMode.PLAIN_FLOAT32
    if dtype == np.dtype(np.float64):
        return ComputeMode.FLOAT64
    tf32 = options.allow_tf32 and dtype == np.dtype(np.float32)
    return ComputeMode.TF32 if tf32 else ComputeMode.FLOAT32
