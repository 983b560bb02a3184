"""What a call does on the card between its upload and its download."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from deconvd.problem import Problem, TensorSpec
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.plan import Plan

__all__ = ["DeconvolveJob", "GradientsJob", "Job", "Step"]


class Step(NamedTuple):
    """A part of a job, which can begin before all operands are there and end before all results are made.

    Attributes:
        operands, results: Which it is computed from and which it makes, by their numbers in the job.
        enqueue: Enqueues it; takes what `Job.enqueue` takes.
    """

    operands: Sequence[int]
    results: Sequence[int]
    enqueue: Callable[[Sequence[int], Sequence[int], int, int], None]


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

    @property
    def steps(self) -> Sequence[Step]:
        """All of it, in the order in which it is to be done."""

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

    @property
    def steps(self) -> Sequence[Step]:
        """See `Job`."""
        return (Step(range(len(self.operands)), (0,), self.enqueue),)

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
        plans = [plan for plan in (gx_plan, gW_plan) if plan is not None]
        operands = [problem.y]
        operands += [problem.x] if gW_plan is not None else []
        operands += [problem.W] if gx_plan is not None else []
        self.operands = tuple(operands)
        self.results = tuple(_results(problem, gx_plan, gW_plan, with_gb=with_gb))
        self.workspace_bytes = max((plan.workspace_bytes for plan in plans), default=0)
        self.steps = tuple(self._all_steps(gx_plan, gW_plan, with_gb=with_gb))

    def _all_steps(
        self, gx_plan: Plan | None, gW_plan: Plan | None, *, with_gb: bool
    ) -> Iterator[Step]:
        # they bring the operands in the order W, gy, x: that in which early calls have them written
        gy, x, W = 0, 1, len(self.operands) - 1
        gx, gW, gb = 0, 0 if gx_plan is None else 1, len(self.results) - 1
        if gx_plan is not None:
            yield Step((W, gy), (gx,), _product(gx_plan, gy, W, gx))
        if gW_plan is not None:
            yield Step((gy, x), (gW,), _product(gW_plan, x, gy, gW))
        if with_gb:
            spec = self.operands[gy]
            yield Step(
                (gy,),
                (gb,),
                lambda operands, results, _, stream: kernels.sum_gb(
                    operands[gy], results[gb], spec, stream
                ),
            )

    def enqueue(
        self, operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Enqueue the gradients, one behind the other. See `Job`."""
        for step in self.steps:
            step.enqueue(operands, results, workspace, stream)


def _product(
    plan: Plan, a: int, b: int, out: int
) -> Callable[[Sequence[int], Sequence[int], int, int], None]:
    """Return what enqueues a plan, for operands and a result by their numbers. See `Step`."""

    def enqueue(
        operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
    ) -> None:
        plan.execute(operands[a], operands[b], results[out], workspace, stream)

    return enqueue


def _results(
    problem: Problem, gx_plan: Plan | None, gW_plan: Plan | None, *, with_gb: bool
) -> list[TensorSpec]:
    results = [problem.x] if gx_plan is not None else []
    results += [problem.W] if gW_plan is not None else []
    return results + ([problem.b] if with_gb else [])
