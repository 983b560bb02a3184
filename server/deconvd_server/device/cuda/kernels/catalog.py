"""The kernels that are compiled ahead: those of usual layers, the likeliest first.

The list is made from plans of problems that stand for these layers, so no macro of a plan is written twice. Kernels of
other layers are compiled when they are first launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np

from deconvd.model.dtypes import BFLOAT16, ELEMENT_TYPES, DType
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.kernels.depthwise import depthwise_plans
from deconvd_server.device.cuda.kernels.elementwise import (
    cast_kernels,
    crop_kernel,
    elementwise_kernels,
)
from deconvd_server.device.cuda.kernels.fallback import fallback_kernels
from deconvd_server.device.cuda.kernels.launch import Kernel
from deconvd_server.device.cuda.kernels.steps import Launch, StepPlan
from deconvd_server.device.cuda.kernels.tensor_cores import tensor_core_plans
from deconvd_server.device.cuda.plan import Product

__all__ = ["common_kernels"]

_STRIDES = (2, 1, 4, 3, 8, 16, 32, 5, 6, 7, 64)
"""Strides along both axes, for the tensor cores: all that they take."""

_HALVES = (np.dtype(np.float16), BFLOAT16)

_WIDTHS = (16, 32, 64, 128)
"""Columns of a product: one for each width of a block's tile."""

_DEPTHWISE = ((3, 1, 1), (3, 2, 1), (4, 2, 1), (2, 2, 0), (5, 1, 2), (5, 2, 2), (7, 1, 3))
"""Kernels, strides and pads of depthwise layers."""

_PROCESSORS_COUNT = 100
"""Of some card: launches depend on it, kernels do not."""


def common_kernels() -> list[Kernel]:
    """Return a kernel of each file and set of macros that is compiled ahead."""
    by_module = {(kernel.file, kernel.options): kernel for kernel in reversed([*_kernels()])}
    return [*reversed(by_module.values())]


def _kernels() -> Iterator[Kernel]:
    for dtype in ELEMENT_TYPES:
        yield from elementwise_kernels(dtype) + fallback_kernels(dtype)
    for problem in _problems():
        for wanted in Product:
            for plan in (
                *tensor_core_plans(wanted, problem, _PROCESSORS_COUNT),
                *depthwise_plans(wanted, problem, _PROCESSORS_COUNT),
            ):
                yield from _kernels_of(plan)
    yield from cast_kernels()
    yield from map(crop_kernel, ELEMENT_TYPES)


def _kernels_of(plan: StepPlan) -> Iterator[Kernel]:
    yield from (step.kernel for step in plan.steps if isinstance(step, Launch))


def _problems() -> Iterator[Problem]:
    for stride, dtype in product(_STRIDES, _HALVES):
        for channels, pad in (*_channels(stride), *(((64, 8), pad) for pad in _pads(stride))):
            for kernel in (2 * stride, stride):
                W = (*channels, kernel, kernel)
                geometry = Geometry((stride,) * 2, (pad,) * 2)
                yield _problem((1, channels[0], 8, 8), W, geometry, dtype)
    for (kernel, stride, pad), dtype in product(_DEPTHWISE, ELEMENT_TYPES):
        geometry = Geometry((stride,) * 2, (pad,) * 2, groups=8)
        yield _problem((1, 8, 16, 16), (8, 1, kernel, kernel), geometry, dtype)


def _channels(stride: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield input and output channels, and a pad: each tile of products with channels, which few strides have all."""
    for outputs in dict.fromkeys(max(width // stride**2, 1) for width in _WIDTHS):
        yield (64, outputs), 0
        if stride <= 2:
            yield (128, outputs), 0


def _pads(stride: int) -> Iterator[int]:
    """Yield pads, one of each remainder that is compiled: all of a small stride; of a large one none and half of it."""
    yield from range(stride) if stride <= 4 else (0, stride // 2)


def _problem(x: tuple[int, ...], W: tuple[int, ...], geometry: Geometry, dtype: DType) -> Problem:
    return Problem(TensorSpec(x, dtype), TensorSpec(W, dtype), geometry)
