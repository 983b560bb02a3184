"""What a call does on the card between its upload and its download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from deconvd.problem import Problem, TensorSpec
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.plan import Plan

__all__ = ["DeconvolveJob", "GradientsJob", "Job"]


class Job(Protocol):
    """The work of one call, wherever its tensors lie."""

    @property
    def operands(self) -> Sequence[TensorSpec]:
        """What it computes from."""

    @property
    def results(self) -> Sequence[TensorSpec]:
        """What it computes."""

    @property
    def workspace_bytes(self) -> int:
        """Memory that it scribbles on."""

    def enqueue(
        self, operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Enqueue all work between upload and download on a stream.

        Args:
            operands, results: Addresses, aligned as plans want it.
            workspace: Address of `workspace_bytes`, aligned to 256 bytes.
        """


class DeconvolveJob:
    """y of x, W and perhaps b. See `Job`.

    Args:
        plan: For y.
    """

    def __init__(self, problem: Problem, plan: Plan, *, with_b: bool) -> None:
        self.operands = (problem.x, problem.W, *([problem.b] if with_b else []))
        self.results = (problem.y,)
        self.workspace_bytes = plan.workspace_bytes
        self._plan = plan

    def enqueue(
        self, operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Enqueue the products and the bias. See `Job`."""
        x, W, *b = operands
        (y,) = results
        self._plan.execute(x, W, y, workspace, stream)
        if b:
            kernels.add_bias(y, b[0], self.results[0], stream)


class GradientsJob:
    """The wanted ones of gx, gW and gb. See `Job`.

    The operands are gy, then x if gW is wanted, then W if gx is; the results are the wanted
    gradients in the order gx, gW, gb.

    Args:
        gx_plan, gW_plan: None for one that is not wanted.
    """

    def __init__(
        self, problem: Problem, gx_plan: Plan | None, gW_plan: Plan | None, *, with_gb: bool
    ) -> None:
        self._gx_plan, self._gW_plan, self._with_gb = gx_plan, gW_plan, with_gb
        plans = [plan for plan in (gx_plan, gW_plan) if plan is not None]
        operands = [problem.y]
        operands += [problem.x] if gW_plan is not None else []
        operands += [problem.W] if gx_plan is not None else []
        self.operands = tuple(operands)
        self.results = tuple(_results(problem, gx_plan, gW_plan, with_gb=with_gb))
        self.workspace_bytes = max((plan.workspace_bytes for plan in plans), default=0)

    def enqueue(
        self, operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Enqueue the gradients, one behind the other. See `Job`."""
        gy, *others = operands
        if self._gx_plan is not None:
            self._gx_plan.execute(gy, others[-1], results[0], workspace, stream)
        if self._gW_plan is not None:
            gW = results[0 if self._gx_plan is None else 1]
            self._gW_plan.execute(others[0], gy, gW, workspace, stream)
        if self._with_gb:
            kernels.sum_gb(gy, results[-1], self.operands[0], stream)


def _results(
    problem: Problem, gx_plan: Plan | None, gW_plan: Plan | None, *, with_gb: bool
) -> list[TensorSpec]:
    results = [problem.x] if gx_plan is not None else []
    results += [problem.W] if gW_plan is not None else []
    return results + ([problem.b] if with_gb else [])
