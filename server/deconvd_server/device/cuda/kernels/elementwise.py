"""The bias, casts, transposes and gb: kernels that move each element once, on any stream and alignment."""

from __future__ import annotations

import math

import numpy as np

from deconvd.model.dtypes import DType
from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.kernels.launch import (
    Grid,
    Kernel,
    element,
    index,
    integer,
    pointer,
)

__all__ = [
    "add_bias",
    "cast",
    "elementwise_kernels",
    "sum_gb",
    "transpose_to_nchw",
    "transpose_to_nhwc",
]

_THREADS = 256
_BLOCKS = 132 * 16
"""Blocks that fill a large card several times over; each loops over what is left."""

_CLUSTER = 8
_FEW_CHANNELS = 256
"""With fewer channels than this a block for each leaves much of a card idle."""


def add_bias(y: int, b: int, spec: TensorSpec, stream: int) -> None:
    """Add b[c] to every element of channel c of y.

    Args:
        y, b: Device pointers; y is contiguous and modified.
        spec: What y is: shape ``(n, c_O, h_O, w_O)``.
        stream: The CUDA stream.
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
        _bias_kernel(spec.dtype).launch(_grid(count, spec.dtype.itemsize), arguments, stream)


def cast(
    source: int, source_type: DType, target: int, target_type: DType, count: int, stream: int
) -> None:
    """Set `count` elements at the device pointer `target` to those at `source`, rounded to the nearest."""
    if count:
        itemsize = max(source_type.itemsize, target_type.itemsize)
        arguments = (pointer(source), pointer(target), index(count))
        _cast_kernel(source_type, target_type).launch(_grid(count, itemsize), arguments, stream)


def sum_gb(gy: int, gb: int, spec: TensorSpec, stream: int) -> None:
    """Set gb[c] to the sum of gy's channel c. The order of the sum depends on the shape alone.

    Args:
        gy, gb: Device pointers; gy is contiguous.
        spec: What gy is: shape ``(n, c_O, h_O, w_O)``.
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


def _transpose(
    source: int, target: int, batch: int, rows: int, columns: int, dtype: DType, stream: int
) -> None:
    if batch * rows * columns:
        tile = 32 if dtype.itemsize == 8 else 64
        tiles = batch * -(-rows // tile) * -(-columns // tile)
        arguments = (pointer(source), pointer(target), index(batch), index(rows), index(columns))
        _transpose_kernel(dtype).launch((min(tiles, 2**31 - 1), 1, 1), arguments, stream)


def _grid(count: int, itemsize: int) -> Grid:
    vectors = -(-count * itemsize // 16)
    return min(-(-vectors // _THREADS), _BLOCKS), 1, 1


def _bias_kernel(dtype: DType) -> Kernel:
    # Both kernels of the file are compiled together: the unused macro needs some value.
    return Kernel(
        "elementwise.cu", "add_bias", (element(dtype), element(np.dtype(np.float32), "SOURCE"))
    )


def _cast_kernel(source: DType, target: DType) -> Kernel:
    return Kernel("elementwise.cu", "cast", (element(target), element(source, "SOURCE")))


def _sum_kernel(dtype: DType, *, few: bool) -> Kernel:
    name = "sum_few_channels" if few else "sum_channels"
    return Kernel("reduction.cu", name, (element(dtype),), threads=512)


def _transpose_kernel(dtype: DType) -> Kernel:
    return Kernel("transpose.cu", "transpose", (element(dtype),))
