"""Our own CUDA kernels.

    fallback        the plan for every problem: cuBLAS products of columns
    depthwise       plans for groups of one channel
    tensor_cores    plans for half precision, of operands that are packed first (`packing`)
    elementwise     bias, casts, transposes, gb

Plans are made without a device or CuPy. Kernels are compiled for a device when they are first launched there.
"""

from __future__ import annotations

from deconvd.model.dtypes import ELEMENT_TYPES
from deconvd.model.options import Options, UseCudnnTensorCore
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.depthwise import depthwise_plans
from deconvd_server.device.cuda.kernels.elementwise import (
    add_bias,
    cast,
    elementwise_kernels,
    sum_gb,
    transpose_to_nchw,
    transpose_to_nhwc,
)
from deconvd_server.device.cuda.kernels.fallback import fallback, fallback_kernels
from deconvd_server.device.cuda.kernels.launch import compile_kernels
from deconvd_server.device.cuda.kernels.tensor_cores import tensor_core_plans
from deconvd_server.device.cuda.plan import Plan, Product

__all__ = [
    "add_bias",
    "candidates",
    "cast",
    "compile_common_kernels",
    "fallback",
    "sum_gb",
    "transpose_to_nchw",
    "transpose_to_nhwc",
]


def candidates(
    product: Product, problem: Problem, options: Options, processors_count: int
) -> list[Plan]:
    """Return our plans for a product, without the fallback, the most promising first. All are deterministic.

    The problem has products, and its x and W share one element type.

    Args:
        processors_count: Multiprocessors of the card that the plans are for. The number of parts in which gx and gW are
            summed depends on it, so two kinds of cards may round them differently.
    """
    plans: list[Plan] = [*depthwise_plans(product, problem, processors_count)]
    if options.use_cudnn_tensor_core is not UseCudnnTensorCore.NEVER:
        plans += tensor_core_plans(product, problem, processors_count)
    return plans


def compile_common_kernels(device: int) -> None:
    """Compile the kernels that almost every request needs. The others are compiled when they are first launched."""
    import cupy

    with cupy.cuda.Device(device):
        for dtype in ELEMENT_TYPES:
            compile_kernels(elementwise_kernels(dtype) + fallback_kernels(dtype))
