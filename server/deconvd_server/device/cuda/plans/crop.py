"""Plans for an outsize that is smaller than the natural size, which cuDNN does not support.

On each axis cuDNN computes at the larger of the natural and the wanted size:

    y     the far edge, beyond the wanted size, is cropped
    gy    the far edge, beyond the given size, is filled with zeros, which add nothing to gx and gW
"""

from __future__ import annotations

import math
from dataclasses import replace

from deconvd.model.problem import Problem
from deconvd_server.device.cuda.api.memory import BlockLayout, BlockRegion
from deconvd_server.device.cuda.kernels.elementwise import crop_kernel
from deconvd_server.device.cuda.kernels.launch import (
    THREADS,
    Argument,
    index,
    integer,
    pointer,
)
from deconvd_server.device.cuda.plan import Plan, Product

__all__ = ["CropPlan", "with_natural_outsize"]

_MAX_BLOCKS = 1 << 16


def with_natural_outsize(problem: Problem) -> Problem:
    """Return the problem with a y that has at least the natural size on each axis."""
    natural = problem.geometry.natural_size(problem.image, problem.kernel)
    h, w = (max(pair) for pair in zip(problem.output, natural, strict=True))
    return Problem(problem.x, problem.W, replace(problem.geometry, outsize=(h, w)))


class CropPlan:
    """A plan for a problem, made of a plan for the enlarged problem. See `Plan`.

    Args:
        inner: A plan for `with_natural_outsize(problem)`.
    """

    def __init__(self, product: Product, problem: Problem, inner: Plan) -> None:
        self._product = product
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

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the product. See `Plan`."""
        images, scratch = workspace + self._images.offset, workspace + self._scratch.offset
        if self._product is Product.Y:
            self._inner.execute(a, b, images, scratch, stream)
            self._copy(images, self._large.shape, out, self._small.shape, stream)
        elif self._product is Product.GX:
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
        kernel = crop_kernel(self._small.dtype)
        blocks = min(-(-count // THREADS), _MAX_BLOCKS)
        kernel.launch((blocks, 1, 1), arguments, stream)
