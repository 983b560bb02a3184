"""Plans for depthwise problems, one input channel a group, with small square filters: limited by memory alone."""

from __future__ import annotations

import math

from deconvd.model.geometry import MAX_EXTENT
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.geometry import KernelGeometry
from deconvd_server.device.cuda.kernels.launch import Kernel, element, integer
from deconvd_server.device.cuda.kernels.steps import Launch, Place, Slot, StepPlan, Workspace
from deconvd_server.device.cuda.plan import Product

__all__ = ["depthwise_plans"]

_MAX_KERNEL = 7
_MAX_GRID_Y = 65535
_THREADS = 256
_VECTORS_PER_THREAD = 8
"""Work enough to pay for loading the filter."""

_BLOCKS = 132 * 8
_MAX_PARTS = 64

_A, _B, _OUT = Place(Slot.A), Place(Slot.B), Place(Slot.OUT)


def depthwise_plans(operation: Product, problem: Problem) -> list[StepPlan]:
    """Return the plans for a problem that has products: one, or none where it is not suited."""
    if not _is_suited(problem):
        return []
    if operation is Product.GW:
        return [_gW_plan(problem)]
    return [_image_plan(operation, problem)]


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


def _image_plan(operation: Product, problem: Problem) -> StepPlan:
    """Return the plan for y or gx: a block for each part of each plane."""
    output = operation is Product.Y
    channels = problem.c_O if output else problem.c_I
    h, w = problem.output if output else problem.image
    width = _output_width(problem) // (1 if output else problem.geometry.stride[0])
    vectors = h * -(-w // width)
    grid = -(-vectors // (_THREADS * _VECTORS_PER_THREAD)), problem.n * channels, 1
    kernel = _kernel(f"depthwise_{operation}", problem)
    launch = Launch(kernel, grid, (_A, _B, _OUT), (KernelGeometry.of(problem),))
    return StepPlan("depthwise", 0, (launch,))


def _gW_plan(problem: Problem) -> StepPlan:
    workspace = Workspace()
    width = _output_width(problem) // problem.geometry.stride[0]
    vectors = problem.n * problem.image[0] * -(-problem.image[1] // width)
    wanted = min(-(-_BLOCKS // problem.c_O), _MAX_PARTS)
    parts_count = max(min(wanted, vectors // _THREADS), 1)
    count = math.prod(problem.W.shape)
    sums = workspace.take(parts_count * count * problem.compute_type.itemsize)
    correlate = Launch(
        _kernel("depthwise_gW", problem),
        (parts_count, problem.c_O, 1),
        (_A, _B, sums),
        (KernelGeometry.of(problem),),
    )
    add = Launch(
        _kernel("depthwise_add_parts", problem),
        (-(-count // _THREADS), 1, 1),
        (sums, _OUT),
        (integer(problem.c_O), integer(parts_count)),
    )
    return StepPlan("depthwise", workspace.size_bytes, (correlate, add))


def _output_width(problem: Problem) -> int:
    """Return how many output pixels a vector holds."""
    return 16 // problem.x.dtype.itemsize


def _kernel(name: str, problem: Problem) -> Kernel:
    macros = (
        element(problem.x.dtype),
        ("KERNEL", str(problem.kernel[0])),
        ("STRIDE", str(problem.geometry.stride[0])),
        ("PAD", str(problem.geometry.pad[0])),
    )
    return Kernel("depthwise.cu", name, macros)
