"""Our own CUDA kernels: the fallback for every problem, faster ways for some, and what surrounds a product.

Plans are made without touching a device; kernels are compiled for a device when they are first launched there.
"""

from __future__ import annotations

import cupy

from deconvd.model.dtypes import ELEMENT_TYPES
from deconvd.model.options import Options
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
    "fallback",
    "prepare",
    "sum_gb",
    "transpose_to_nchw",
    "transpose_to_nhwc",
]


def candidates(
    operation: Product,
    problem: Problem,
    options: Options,  # noqa: ARG001  # the same for every one of our kernels so far
) -> list[Plan]:
    """Return our plans for an operation, the best guess first; perhaps none. All are deterministic.

    The problem has products, and its x and W share one element type. The fallback is not among them.
    """
    return [
        *depthwise_plans(operation, problem),
        *tensor_core_plans(operation, problem),
    ]


def prepare(device: int) -> None:
    """Compile for a device what almost every request needs. The rest is compiled when first used."""
    with cupy.cuda.Device(device):
        for dtype in ELEMENT_TYPES:
            compile_kernels(elementwise_kernels(dtype) + fallback_kernels(dtype))
