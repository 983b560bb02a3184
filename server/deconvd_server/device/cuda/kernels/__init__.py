"""Our own CUDA kernels.

    fallback        the plan for every problem: cuBLAS products of columns
    depthwise       plans for groups of one channel
    tensor_cores    plans for half precision, of operands that are packed first (`packing`)
    elementwise     bias, casts, transposes, gb

Plans are made without a device or CuPy. Kernels are loaded for a device when they are first launched there. The machine
code of those of usual layers travels with deconvd (`archive`); of the others it is compiled at need (`cubins`).
"""

from __future__ import annotations

from collections.abc import Callable

from deconvd.model.options import Options, UseCudnnTensorCore
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.kernels.archive import has_cubins
from deconvd_server.device.cuda.kernels.cubin_cache import default_folder
from deconvd_server.device.cuda.kernels.depthwise import depthwise_plans
from deconvd_server.device.cuda.kernels.elementwise import (
    add_bias,
    cast,
    sum_gb,
    transpose_to_nchw,
    transpose_to_nhwc,
)
from deconvd_server.device.cuda.kernels.fallback import fallback
from deconvd_server.device.cuda.kernels.launch import compile_kernels, keep_compiled
from deconvd_server.device.cuda.kernels.launch import is_shipped as is_kernel_shipped
from deconvd_server.device.cuda.kernels.steps import Launch, StepPlan
from deconvd_server.device.cuda.kernels.tensor_cores import tensor_core_plans
from deconvd_server.device.cuda.plan import Plan, Product

__all__ = [
    "add_bias",
    "are_shipped",
    "candidates",
    "cast",
    "default_folder",
    "fallback",
    "is_shipped",
    "keep_compiled",
    "load_common_kernels",
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


def are_shipped(device: int) -> bool:
    """Return whether the kernels of usual layers came with deconvd for a card."""
    import cupy

    return has_cubins(int(cupy.cuda.Device(device).compute_capability))


def is_shipped(plan: Plan, capability: int) -> bool:
    """Return whether the machine code of a plan of ours came with deconvd, for cards of a capability."""
    steps = plan.steps if isinstance(plan, StepPlan) else ()
    return all(
        is_kernel_shipped(step.kernel, capability) for step in steps if isinstance(step, Launch)
    )


def load_common_kernels(device: int, is_wanted: Callable[[], bool]) -> None:
    """Load the kernels of usual layers for a card, the likeliest first. Compile those that did not come with deconvd.

    The others are loaded when they are first launched.

    Args:
        is_wanted: Asked before each kernel; False ends it.

    Raises:
        CompileError: One cannot be compiled.
    """
    import cupy

    # imported here: a list of what is compiled ahead, which takes some 0.1 s to make
    from deconvd_server.device.cuda.kernels.catalog import common_kernels

    with cupy.cuda.Device(device):
        for kernel in common_kernels():
            if not is_wanted():
                return
            compile_kernels([kernel])
