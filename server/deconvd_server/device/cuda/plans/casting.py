"""Plans for mixed element types: operands are cast to the compute type, and the result to its own type."""

from __future__ import annotations

import math
from dataclasses import replace

from deconvd.model.dtypes import DType
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.api.memory import BlockLayout, BlockRegion
from deconvd_server.device.cuda.plan import Plan, Product

__all__ = ["CastPlan", "operands_of", "result_of", "with_uniform_type"]


def with_uniform_type(problem: Problem) -> Problem:
    """Return the problem with x and W of one element type: theirs if they share one, else the compute type."""
    if problem.x.dtype == problem.W.dtype:
        return problem
    dtype = problem.compute_type
    return Problem(
        replace(problem.x, dtype=dtype), replace(problem.W, dtype=dtype), problem.geometry
    )


def operands_of(product: Product, problem: Problem) -> tuple[TensorSpec, TensorSpec]:
    """Return the specs of a plan's operands a and b."""
    return {
        Product.Y: (problem.x, problem.W),
        Product.GX: (problem.y, problem.W),
        Product.GW: (problem.x, problem.y),
    }[product]


def result_of(product: Product, problem: Problem) -> TensorSpec:
    """Return the spec of a plan's result, `out`."""
    return {
        Product.Y: problem.y,
        Product.GX: problem.x,
        Product.GW: problem.W,
    }[product]


class CastPlan:
    """A plan for a problem of mixed types, made of a plan for the problem in one type. See `Plan`.

    Args:
        inner: A plan for `with_uniform_type(problem)`.
        processors_count: Multiprocessors of the card.
    """

    def __init__(
        self,
        product: Product,
        problem: Problem,
        inner: Plan,
        processors_count: int,
    ) -> None:
        self._inner = inner
        self._processors_count = processors_count
        self._type = problem.compute_type
        self._operands = operands_of(product, problem)
        self._result = result_of(product, problem)
        regions = BlockLayout()
        specs = (*self._operands, self._result)
        self._regions = [self._region(regions, spec) for spec in specs]
        self._scratch = regions.add(inner.workspace_bytes)
        self.workspace_bytes = regions.total_bytes

    def _region(self, regions: BlockLayout, spec: TensorSpec) -> BlockRegion | None:
        """Return a region for a tensor's cast; None if it needs none."""
        if spec.dtype == self._type:
            return None
        return regions.add(replace(spec, dtype=self._type).nbytes)

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
        given = (a, b, out)
        cast_a, cast_b, cast_out = (
            pointer if region is None else workspace + region.offset
            for pointer, region in zip(given, self._regions, strict=True)
        )
        self._cast(a, self._operands[0], cast_a, stream)
        self._cast(b, self._operands[1], cast_b, stream)
        self._inner.execute(cast_a, cast_b, cast_out, workspace + self._scratch.offset, stream)
        if cast_out != out:
            count = math.prod(self._result.shape)
            kernels.cast(
                cast_out,
                self._type,
                out,
                self._result.dtype,
                count,
                stream,
                self._processors_count,
            )

    def _cast(self, source: int, spec: TensorSpec, target: int, stream: int) -> None:
        if target != source:
            dtype: DType = spec.dtype
            count = math.prod(spec.shape)
            kernels.cast(source, dtype, target, self._type, count, stream, self._processors_count)
