"""What plans of our own kernels launch, on cards that need not be there."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from deconvd.model.dtypes import ELEMENT_TYPES
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device import cuda
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.kernels.launch import Argument, Grid, Kernel
from deconvd_server.device.cuda.kernels.steps import Launch, StepPlan
from deconvd_server.device.cuda.plan import Plan, Product
from deconvd_server.device.cuda.plans.crop import CropPlan

__all__ = ["FILES", "FOLDER", "H100", "L4", "launched", "launches_of", "plans_of", "problems"]

FOLDER = Path(cuda.__file__).parent
FILES = sorted(path.name for path in FOLDER.rglob("*.cu"))

H100, L4 = 132, 58
"""Processors of two cards."""

WAYS = {
    "wide": ((8, 32, 8, 8), (32, 24, 4, 4), Geometry((2, 2), (1, 1))),
    "few": ((2, 5, 7, 9), (5, 3, 3, 3), Geometry((1, 1), (1, 1))),
    "deep": ((1, 512, 4, 4), (512, 128, 4, 4), Geometry((2, 2), (1, 1))),
    "odd stride": ((2, 16, 8, 8), (16, 8, 6, 6), Geometry((3, 3), (1, 2))),
    "large stride": ((2, 21, 8, 8), (21, 21, 64, 64), Geometry((32, 32), (16, 16))),
    "whole stride": ((2, 16, 4, 8), (16, 8, 4, 4), Geometry((4, 4), (1, 3))),
    "stride of a vector": ((2, 16, 4, 8), (16, 3, 8, 8), Geometry((8, 8), (0, 5))),
    "two odd strides": ((2, 16, 4, 8), (16, 8, 5, 7), Geometry((5, 7), (0, 0))),
    "two even strides": ((2, 16, 4, 8), (16, 8, 6, 16), Geometry((6, 16), (1, 8))),
    "largest stride": ((1, 8, 2, 2), (8, 1, 64, 64), Geometry((64, 64), (0, 0))),
    "one tap": ((2, 32, 8, 8), (32, 8, 1, 1), Geometry()),
    "one tap, many inputs": ((2, 130, 8, 8), (130, 24, 1, 1), Geometry()),
    "one tap, many outputs": ((2, 16, 8, 8), (16, 64, 1, 1), Geometry()),
    "depthwise": ((4, 16, 32, 32), (16, 1, 4, 4), Geometry((2, 2), (1, 1), groups=16)),
    "general": ((2, 6, 9, 8), (6, 2, 3, 5), Geometry((2, 3), (1, 0), (None, None), (2, 1), 2)),
    "far": ((1, 1, 1, 2), (1, 1, 1, 1), Geometry((1, 2**31 - 2))),
}


def problems() -> Iterator[Problem]:
    for (x, W, geometry), dtype in product(WAYS.values(), ELEMENT_TYPES):
        yield Problem(TensorSpec(x, dtype), TensorSpec(W, dtype), geometry)


def plans_of(operation: Product, problem: Problem, processors_count: int) -> list[Plan]:
    options = Options()
    return [
        *kernels.candidates(operation, problem, options, processors_count),
        kernels.fallback(operation, problem, options, processors_count),
    ]


def launches_of(plan: Plan) -> Iterator[Launch]:
    assert isinstance(plan, StepPlan)
    yield from (step for step in plan.steps if isinstance(step, Launch))


class Nothing:
    """A plan that enqueues nothing."""

    name, deterministic, workspace_bytes = "nothing", True, 0

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        pass


def surrounding_launches() -> Iterator[tuple[Kernel, tuple[Argument, ...]]]:
    """Yield what is launched around the products."""
    noted: list[tuple[Kernel, tuple[Argument, ...]]] = []

    def note(kernel: Kernel, grid: Grid, arguments: Iterable[Argument], stream: int) -> None:
        noted.append((kernel, tuple(arguments)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "launch", note)
        for dtype in ELEMENT_TYPES:
            for channels in (3, 300):
                spec = TensorSpec((2, channels, 4, 4), dtype)
                kernels.add_bias(0, 0, spec, 0, L4)
                kernels.sum_gb(0, 0, spec, 0)
            kernels.transpose_to_nhwc(0, 0, 2, 3, 4, 4, dtype, 0)
            for other in ELEMENT_TYPES:
                kernels.cast(0, dtype, 0, other, 9, 0, L4)
            x, W = TensorSpec((2, 3, 4, 4), dtype), TensorSpec((3, 2, 3, 3), dtype)
            problem = Problem(x, W, Geometry((2, 2), (0, 0), (8, 8)))
            CropPlan(Product.Y, problem, Nothing()).execute(0, 0, 0, 0, 0)
    yield from noted


@cache
def launched() -> dict[str, list[tuple[Kernel, tuple[type, ...]]]]:
    """Return what is launched of each .cu file, and with which types of arguments."""
    found: dict[str, list[tuple[Kernel, tuple[type, ...]]]] = defaultdict(list)
    for problem, operation in product(problems(), Product):
        for plan in plans_of(operation, problem, L4):
            for launch in launches_of(plan):
                types = [ctypes.c_void_p for _ in launch.buffers], map(type, launch.constants)
                found[launch.kernel.file].append((launch.kernel, (*types[0], *types[1])))
    for kernel, arguments in surrounding_launches():
        found[kernel.file].append((kernel, tuple(map(type, arguments))))
    return found
