"""The bias, casts, transposes and gb: kernels that move each element once, on any stream and alignment."""

from __future__ import annotations

import math

import numpy as np

from deconvd.model.dtypes import ELEMENT_TYPES, DType
from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.kernels.launch import (
    THREADS,
    Grid,
    Kernel,
    constants,
    element,
    index,
    integer,
    pointer,
)

__all__ = [
    "add_bias",
    "cast",
    "cast_kernels",
    "crop_kernel",
    "elementwise_kernels",
    "sum_gb",
    "transpose_to_nchw",
    "transpose_to_nhwc",
]

_BLOCKS_PER_PROCESSOR = 16
"""The most blocks for each multiprocessor. They fill a card several times over. Threads loop over the rest."""

_SUM_THREADS = 512
"""Threads of a block that sums gb."""

_CLUSTER = 8
"""Blocks that sum one channel together, if there are few channels."""

_FEW_CHANNELS = 256
"""With fewer channels than this, one block for each channel would leave much of a card idle."""


def add_bias(y: int, b: int, spec: TensorSpec, stream: int, processors_count: int) -> None:
    """Add b[c] to every element of channel c of y.

    Args:
        y, b: Device pointers. y is contiguous, and is modified.
        spec: The spec of y, of shape ``(n, c_O, h_O, w_O)``.
        stream: The CUDA stream.
        processors_count: Multiprocessors of the card.
    """
    count = math.prod(spec.shape)
    if count:
        arguments = (
            pointer(y),
            pointer(b),
            index(count),
            integer(spec.shape[1]),
            index(math.prod(spec.shape[2:])),
        )
        grid = _grid(count, spec.dtype.itemsize, processors_count)
        _bias_kernel(spec.dtype).launch(grid, arguments, stream)


def cast(
    source: int,
    source_type: DType,
    target: int,
    target_type: DType,
    count: int,
    stream: int,
    processors_count: int,
) -> None:
    """Copy `count` elements from one device pointer to another, rounded to the nearest of the other element type.

    Args:
        processors_count: Multiprocessors of the card.
    """
    if count:
        itemsize = max(source_type.itemsize, target_type.itemsize)
        arguments = (pointer(source), pointer(target), index(count))
        grid = _grid(count, itemsize, processors_count)
        _cast_kernel(source_type, target_type).launch(grid, arguments, stream)


def sum_gb(gy: int, gb: int, spec: TensorSpec, stream: int) -> None:
    """Set gb[c] to the sum of gy's channel c. The order of the sum depends on the shape alone.

    Args:
        gy, gb: Device pointers. gy is contiguous.
        spec: The spec of gy, of shape ``(n, c_O, h_O, w_O)``.
        stream: The CUDA stream.
    """
    n, channels, *image = spec.shape
    if channels:
        few = channels < _FEW_CHANNELS
        arguments = (
            pointer(gy),
            pointer(gb),
            integer(n),
            integer(channels),
            index(math.prod(image)),
        )
        blocks = channels * _CLUSTER if few else channels
        _sum_kernel(spec.dtype, few=few).launch((blocks, 1, 1), arguments, stream)


def transpose_to_nhwc(
    source: int, target: int, n: int, c: int, h: int, w: int, dtype: DType, stream: int
) -> None:
    """Set target, of shape ``(n, h, w, c)``, to source, of shape ``(n, c, h, w)``. Both are device pointers."""
    _transpose(source, target, n, c, h * w, dtype, stream)


def transpose_to_nchw(
    source: int, target: int, n: int, c: int, h: int, w: int, dtype: DType, stream: int
) -> None:
    """Set target, of shape ``(n, c, h, w)``, to source, of shape ``(n, h, w, c)``. Both are device pointers."""
    _transpose(source, target, n, h * w, c, dtype, stream)


def elementwise_kernels(dtype: DType) -> list[Kernel]:
    """Return the kernels that every request of an element type may need."""
    return [
        _bias_kernel(dtype),
        _sum_kernel(dtype, few=True),
        _sum_kernel(dtype, few=False),
        _transpose_kernel(dtype),
    ]


def cast_kernels() -> list[Kernel]:
    """Return the kernels that cast, for all pairs of element types."""
    return [
        _cast_kernel(source, target)
        for source in ELEMENT_TYPES
        for target in ELEMENT_TYPES
        if source != target
    ]


def crop_kernel(dtype: DType) -> Kernel:
    """Return the kernel that copies images to smaller or larger ones."""
    return Kernel("crop.cu", "crop", (element(dtype),))


def _transpose(
    source: int, target: int, batch: int, rows: int, columns: int, dtype: DType, stream: int
) -> None:
    if batch * rows * columns:
        tile = _tile(dtype)
        tiles = batch * -(-rows // tile) * -(-columns // tile)
        arguments = (pointer(source), pointer(target), index(batch), index(rows), index(columns))
        _transpose_kernel(dtype).launch((min(tiles, 2**31 - 1), 1, 1), arguments, stream)


def _grid(count: int, itemsize: int, processors_count: int) -> Grid:
    vectors = -(-count * itemsize // 16)
    return min(-(-vectors // THREADS), processors_count * _BLOCKS_PER_PROCESSOR), 1, 1


def _bias_kernel(dtype: DType) -> Kernel:
    # Both kernels of the file are compiled together: the unused macro needs some value.
    return Kernel(
        "elementwise.cu", "add_bias", (element(dtype), element(np.dtype(np.float32), "SOURCE"))
    )


def _cast_kernel(source: DType, target: DType) -> Kernel:
    return Kernel("elementwise.cu", "cast", (element(target), element(source, "SOURCE")))


def _sum_kernel(dtype: DType, *, few: bool) -> Kernel:
    name = "sum_few_channels" if few else "sum_channels"
    macros = element(dtype), *constants(CLUSTER=_CLUSTER)
    return Kernel("reduction.cu", name, macros, threads=_SUM_THREADS)


def _transpose_kernel(dtype: DType) -> Kernel:
    macros = element(dtype), *constants(TILE=_tile(dtype))
    return Kernel("transpose.cu", "transpose", macros)


def _tile(dtype: DType) -> int:
    """Return the rows and columns of the square that a block transposes at once."""
    return 32 if dtype.itemsize == 8 else 64
