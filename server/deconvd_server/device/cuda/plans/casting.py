"""Mixed element types: operands are cast to the compute type, the result to the type that it must have."""

from __future__ import annotations

import math
from dataclasses import replace

from deconvd.model.dtypes import DType
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.api.memory import BlockLayout, BlockRegion
from deconvd_server.device.cuda.plan import Plan, Prepacking, Product, prepacking_of

__all__ = ["CastPlan", "operands_of", "result_of", "with_uniform_type"]


def with_uniform_type(problem: Problem) -> Problem:
    """Return the problem with x and W of one type: their own if they share it, else the compute type."""
    if problem.x.dtype == problem.W.dtype:
        return problem
    dtype = problem.compute_type
    return Problem(
        replace(problem.x, dtype=dtype), replace(problem.W, dtype=dtype), problem.geometry
    )


def operands_of(operation: Product, problem: Problem) -> tuple[TensorSpec, TensorSpec]:
    """Return what a plan's a and b are."""
    return {
        Product.Y: (problem.x, problem.W),
        Product.GX: (problem.y, problem.W),
        Product.GW: (problem.x, problem.y),
    }[operation]


def result_of(operation: Product, problem: Problem) -> TensorSpec:
    """Return what a plan's out is."""
    return {
        Product.Y: problem.y,
        Product.GX: problem.x,
        Product.GW: problem.W,
    }[operation]


class CastPlan:
    """A plan for a problem of mixed types, made of one for the uniform problem. See `Plan`.

    Args:
        inner: A plan for `uniform(problem)`.
        b_is_ready: Whether b comes as `inner` wants it.
    """

    def __init__(
        self, operation: Product, problem: Problem, inner: Plan, *, b_is_ready: bool = False
    ) -> None:
        self._operation, self._problem = operation, problem
        self._inner = inner
        self._type = problem.compute_type
        self._operands = operands_of(operation, problem)
        self._result = result_of(operation, problem)
        regions = BlockLayout()
        specs = (*self._operands, self._result)
        self._regions = [
            None if is_ready else self._region(regions, spec)
            for spec, is_ready in zip(specs, (False, b_is_ready, False), strict=True)
        ]
        self._scratch = regions.add(inner.workspace_bytes)
        self.workspace_bytes = regions.total_bytes

    def _region(self, regions: BlockLayout, spec: TensorSpec) -> BlockRegion | None:
        """Return where a tensor's cast lies; None if it needs none."""
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

    def prepacking(self) -> Prepacking | None:
        """Return how W is cast, or what the inner plan makes of a W that need not be. See `Preparable`."""
        if self._operation is Product.GW:
            return None
        W = self._operands[1]
        if self._regions[1] is not None:
            size_bytes = self._regions[1].size_bytes
            plan = CastPlan(self._operation, self._problem, self._inner, b_is_ready=True)
            return Prepacking(("cast", self._type), size_bytes, self._cast_W, plan)
        inner = prepacking_of(self._inner) if W.dtype == self._type else None
        if inner is None:
            return None
        plan = CastPlan(self._operation, self._problem, inner.plan, b_is_ready=True)
        return replace(inner, plan=plan)

    def _cast_W(self, W: int, form: int, stream: int) -> None:
        self._cast(W, self._operands[1], form, stream)

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the operation. See `Plan`."""
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
            kernels.cast(cast_out, self._type, out, self._result.dtype, count, stream)

    def _cast(self, source: int, spec: TensorSpec, target: int, stream: int) -> None:
        if target != source:
            dtype: DType = spec.dtype
            kernels.cast(source, dtype, target, self._type, math.prod(spec.shape), stream)
