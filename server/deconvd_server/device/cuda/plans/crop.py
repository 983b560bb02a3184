"""A smaller outsize, for cuDNN, which only knows larger ones: the far edge is cropped or zeroed.

cuDNN computes at the larger of the natural and the wanted size on each axis. What it has beyond the
wanted size of y is dropped; a gy of the wanted size is extended with zeros, which change nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from deconvd.model.problem import Problem
from deconvd_server.device.cuda.api.memory import BlockLayout, BlockRegion
from deconvd_server.device.cuda.kernels.launch import (
    Argument,
    Kernel,
    element,
    index,
    integer,
    pointer,
)
from deconvd_server.device.cuda.plan import Plan, Prepacking, Product, prepacking_of

__all__ = ["CropPlan", "with_natural_outsize"]

_FILE = str(Path(__file__).with_name("window.cu"))
_THREADS = 256
_MAX_BLOCKS = 1 << 16


def with_natural_outsize(problem: Problem) -> Problem:
    """Return the problem with y at least of its natural size on each axis."""
    natural = problem.geometry.natural_size(problem.image, problem.kernel)
    h, w = (max(pair) for pair in zip(problem.output, natural, strict=True))
    return Problem(problem.x, problem.W, replace(problem.geometry, outsize=(h, w)))


class CropPlan:
    """A plan for a problem, made of one for the enlarged problem. See `Plan`.

    Args:
        inner: A plan for `enlarged(problem)`.
    """

    def __init__(self, operation: Product, problem: Problem, inner: Plan) -> None:
        self._operation, self._problem = operation, problem
        self._inner = inner
        self._small, self._large = problem.y, with_natural_outsize(problem).y
        regions = BlockLayout()
        self._images: BlockRegion = regions.add(self._large.nbytes)
        self._scratch: BlockRegion = regions.add(inner.workspace_bytes)
        self.workspace_bytes = regions.total_bytes

    @property
    def name(self) -> str:
        """The inner plan's."""
        return self._inner.name

    @property
    def deterministic(self) -> bool:
        """Whether the inner plan is."""
        return self._inner.deterministic

    def prepacking(self) -> Prepacking | None:
        """Return what the inner plan makes of W, which has no window. See `Preparable`."""
        inner = None if self._operation is Product.GW else prepacking_of(self._inner)
        if inner is None:
            return None
        return replace(inner, plan=CropPlan(self._operation, self._problem, inner.plan))

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the operation. See `Plan`."""
        images, scratch = workspace + self._images.offset, workspace + self._scratch.offset
        if self._operation is Product.Y:
            self._inner.execute(a, b, images, scratch, stream)
            self._copy(images, self._large.shape, out, self._small.shape, stream)
        elif self._operation is Product.GX:
            self._copy(a, self._small.shape, images, self._large.shape, stream)
            self._inner.execute(images, b, out, scratch, stream)
        else:
            self._copy(b, self._small.shape, images, self._large.shape, stream)
            self._inner.execute(a, images, out, scratch, stream)

    def _copy(
        self,
        source: int,
        source_shape: tuple[int, ...],
        target: int,
        target_shape: tuple[int, ...],
        stream: int,
    ) -> None:
        count = math.prod(target_shape)
        extents = (*source_shape[2:], *target_shape[2:])
        arguments: list[Argument] = [pointer(source), pointer(target), index(count)]
        arguments += [integer(extent) for extent in extents]
        kernel = Kernel(_FILE, "window", (element(self._small.dtype),))
        blocks = min(-(-count // _THREADS), _MAX_BLOCKS)
        kernel.launch((blocks, 1, 1), arguments, stream)
