"""What a call does on the card between its upload and its download."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from deconvd.model.operation import Operation, spec_of_field
from deconvd.model.problem import Problem
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.plan import Plan

__all__ = ["DeviceWork", "WorkStep"]

_Enqueue: TypeAlias = Callable[[Sequence[int], Sequence[int], int, int], None]
"""Enqueues work; takes what `Job.enqueue` takes."""


class WorkStep(NamedTuple):
    """A part of a job, which can begin before all operands are there and end before all results are made.

    Attributes:
        operands, results: Which it is computed from and which it makes, by their numbers in the job.
        enqueue: Enqueues it.
    """

    operands: Sequence[int]
    results: Sequence[int]
    enqueue: _Enqueue


_FACTORS: Final = {"y": ("x", "w"), "gx": ("gy", "w"), "gw": ("x", "gy")}
"""The operands of products, by the field of the result: a and b of `Plan.execute`."""


class DeviceWork:
    """The work of one call, wherever its tensors are: those results of an operation that it wants.

    Args:
        operands, results: The names of their fields, in the order that all methods have them in.
        plans: For the products, by the names of their results.

    Attributes:
        operands: What it computes from.
        results: What it computes.
        workspace_bytes: Memory that it scribbles on.
        steps: All of it, in the order in which it is to be done: operands are brought in the order in which
            an early call has them written.
    """

    def __init__(
        self,
        operation: Operation,
        problem: Problem,
        operands: Sequence[str],
        results: Sequence[str],
        plans: Mapping[str, Plan],
    ) -> None:
        self.operands = tuple([spec_of_field(problem, field) for field in operands])
        self.results = tuple([spec_of_field(problem, field) for field in results])
        self.workspace_bytes = max([plan.workspace_bytes for plan in plans.values()], default=0)
        self._numbers = {field: number for number, field in enumerate(operands)}
        self.steps = [
            self._step(operation, result, number, plans) for number, result in enumerate(results)
        ]

    def enqueue(
        self, operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Enqueue all work between upload and download on a stream.

        Args:
            operands, results: Addresses, aligned as plans want it.
            workspace: Address of `workspace_bytes`, aligned to 256 bytes.
        """
        for step in self.steps:
            step.enqueue(operands, results, workspace, stream)

    def _step(
        self, operation: Operation, result: str, number: int, plans: Mapping[str, Plan]
    ) -> WorkStep:
        """Return the step for one result, given its name and its number."""
        used = (*operation.needs[result], *operation.optional)
        at = {
            field: self._numbers[field]
            for field in operation.write_order
            if field in used and field in self._numbers
        }
        enqueue = (
            self._sum(at, number)
            if result == "gb"
            else self._product(at, number, result, plans[result])
        )
        return WorkStep([*at.values()], [number], enqueue)

    def _product(self, at: Mapping[str, int], number: int, result: str, plan: Plan) -> _Enqueue:
        a, b = (at[field] for field in _FACTORS[result])
        bias, spec = at.get("b"), self.results[number]

        def enqueue(
            operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
        ) -> None:
            plan.execute(operands[a], operands[b], results[number], workspace, stream)
            if bias is not None:
                kernels.add_bias(results[number], operands[bias], spec, stream)

        return enqueue

    def _sum(self, at: Mapping[str, int], number: int) -> _Enqueue:
        gy = at["gy"]
        spec = self.operands[gy]

        def enqueue(
            operands: Sequence[int], results: Sequence[int], _workspace: int, stream: int
        ) -> None:
            kernels.sum_gb(operands[gy], results[number], spec, stream)

        return enqueue
