"""Plans for depthwise problems, with one input channel in each group, and small square filters: memory is the limit."""

from __future__ import annotations

import math

from deconvd.model.geometry import MAX_EXTENT
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.geometry import kernel_geometry
from deconvd_server.device.cuda.kernels.launch import (
    THREADS,
    Kernel,
    constants,
    element,
    integer,
)
from deconvd_server.device.cuda.kernels.steps import (
    BufferOffset,
    BufferSlot,
    Launch,
    StepPlan,
    Workspace,
)
from deconvd_server.device.cuda.plan import Product

__all__ = ["depthwise_plans"]

_MAX_KERNEL = 7
"""The most taps on an axis: the filter and its window are in registers."""

_MAX_GRID_Y = 65535
"""The most blocks of a grid along y, by CUDA."""

_VECTORS_PER_THREAD = 8
"""Vectors that a thread computes with one load of the filter."""

_BLOCKS_PER_PROCESSOR = 8
"""Blocks of gW for each multiprocessor, if there are enough pixels: as many as it runs at once."""

_MAX_PARTS = 64
"""The most parts in which the sums of gW are computed."""

_A, _B, _OUT = BufferOffset(BufferSlot.A), BufferOffset(BufferSlot.B), BufferOffset(BufferSlot.OUT)


def depthwise_plans(product: Product, problem: Problem, processors_count: int) -> list[StepPlan]:
    """Return the plans for a problem that has products: one, or none if the problem is not suited."""
    if not _is_suited(problem):
        return []
    if product is Product.GW:
        return [_gW_plan(problem, processors_count * _BLOCKS_PER_PROCESSOR)]
    return [_image_plan(product, problem)]


def _is_suited(problem: Problem) -> bool:
    geometry, kernel = problem.geometry, problem.kernel
    square = all(pair[0] == pair[1] for pair in (kernel, geometry.stride, geometry.pad))
    return (
        problem.groups == problem.c_I
        and square
        and geometry.dilate == (1, 1)
        and kernel[0] <= _MAX_KERNEL
        and geometry.stride[0] <= 2
        and geometry.pad[0] < kernel[0]
        and problem.n * max(problem.c_I, problem.c_O) <= _MAX_GRID_Y
        and max(math.prod(problem.image), math.prod(problem.output)) < MAX_EXTENT // 2
    )


def _image_plan(product: Product, problem: Problem) -> StepPlan:
    """Return the plan for y or gx. It has a block for each part of each plane (sample, channel)."""
    output = product is Product.Y
    channels = problem.c_O if output else problem.c_I
    h, w = problem.output if output else problem.image
    width = _output_width(problem) // (1 if output else problem.geometry.stride[0])
    vectors = h * -(-w // width)
    grid = -(-vectors // (THREADS * _VECTORS_PER_THREAD)), problem.n * channels, 1
    kernel = _kernel(f"depthwise_{product}", problem)
    launch = Launch(kernel, grid, (_A, _B, _OUT), (kernel_geometry(problem),))
    return StepPlan("depthwise", 0, (launch,))


def _gW_plan(problem: Problem, blocks_count: int) -> StepPlan:
    workspace = Workspace()
    width = _output_width(problem) // problem.geometry.stride[0]
    vectors = problem.n * problem.image[0] * -(-problem.image[1] // width)
    wanted = min(-(-blocks_count // problem.c_O), _MAX_PARTS)
    parts_count = max(min(wanted, vectors // THREADS), 1)
    count = math.prod(problem.W.shape)
    sums = workspace.take(parts_count * count * problem.compute_type.itemsize)
    correlate = Launch(
        _kernel("depthwise_gW", problem),
        (parts_count, problem.c_O, 1),
        (_A, _B, sums),
        (kernel_geometry(problem),),
    )
    add = Launch(
        _kernel("depthwise_add_parts", problem),
        (-(-count // THREADS), 1, 1),
        (sums, _OUT),
        (integer(problem.c_O), integer(parts_count)),
    )
    return StepPlan("depthwise", workspace.size_bytes, (correlate, add))


def _output_width(problem: Problem) -> int:
    """Return the output pixels in a vector."""
    return 16 // problem.x.dtype.itemsize


def _kernel(name: str, problem: Problem) -> Kernel:
    macros = (
        element(problem.x.dtype),
        *constants(
            WIDTH=_output_width(problem),
            KERNEL=problem.kernel[0],
            STRIDE=problem.geometry.stride[0],
            PAD=problem.geometry.pad[0],
        ),
    )
    return Kernel("depthwise.cu", name, macros)
