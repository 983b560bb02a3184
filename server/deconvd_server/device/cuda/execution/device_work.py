"""The work of a call on the card, between its upload and its download."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

from deconvd.model.operation import Operation, spec_of_field
from deconvd.model.problem import Problem
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.plan import Plan
from deconvd_server.device.cuda.stand_in import StandIn

__all__ = ["DeviceWork", "WorkStep"]

_Enqueue: TypeAlias = Callable[[Sequence[int], Sequence[int], int, int], None]
"""Enqueues work, with the arguments of `DeviceWork.enqueue`."""


class WorkStep(NamedTuple):
    """The work for one result. It can start before all operands of the call are there.

    Attributes:
        operands, results: The numbers, in the work, of the tensors that the step reads and writes.
        enqueue: Enqueues the step.
    """

    operands: Sequence[int]
    results: Sequence[int]
    enqueue: _Enqueue


_FACTORS: Final = {"y": ("x", "w"), "gx": ("gy", "w"), "gw": ("x", "gy")}
"""The fields of a product's operands a and b, as in `Plan.execute`, by the field of its result."""


class DeviceWork:
    """The work for the results that a call wants of an operation. It is the same wherever its tensors are.

    Args:
        operands, results: The names of their fields. All methods take tensors in this order.
        plans: The plans of the products, by the fields of their results.
        processors_count: Multiprocessors of the card.

    Attributes:
        operands, results: The specs of the tensors.
        workspace_bytes: Size of the scratch memory that the steps use one after the other.
        stand_ins: Those of the plans that others will replace.
        steps: All of the work, in order. A step names its operands in the order in which the client of an overlapped
            call writes them.
    """

    def __init__(
        self,
        operation: Operation,
        problem: Problem,
        operands: Sequence[str],
        results: Sequence[str],
        plans: Mapping[str, Plan],
        processors_count: int,
    ) -> None:
        self._processors_count = processors_count
        self.operands = tuple([spec_of_field(problem, field) for field in operands])
        self.results = tuple([spec_of_field(problem, field) for field in results])
        self.workspace_bytes = max([plan.workspace_bytes for plan in plans.values()], default=0)
        self.stand_ins = tuple([plan for plan in plans.values() if isinstance(plan, StandIn)])
        self._numbers = {field: number for number, field in enumerate(operands)}
        self.steps = [
            self._step(operation, result, number, plans) for number, result in enumerate(results)
        ]

    def enqueue(
        self, operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
    ) -> None:
        """Enqueue all steps on a stream.

        Args:
            operands, results: Addresses on the card, aligned as plans need it.
            workspace: Address of `workspace_bytes` on the card, aligned to 256 bytes.
        """
        for step in self.steps:
            step.enqueue(operands, results, workspace, stream)

    def _step(
        self, operation: Operation, result: str, number: int, plans: Mapping[str, Plan]
    ) -> WorkStep:
        used = (*operation.needs[result], *operation.optional)
        numbers = {
            field: self._numbers[field]
            for field in operation.write_order
            if field in used and field in self._numbers
        }
        enqueue = (
            self._sum(numbers, number)
            if result == "gb"
            else self._product(numbers, number, result, plans[result])
        )
        return WorkStep([*numbers.values()], [number], enqueue)

    def _product(
        self, numbers: Mapping[str, int], number: int, result: str, plan: Plan
    ) -> _Enqueue:
        a, b = (numbers[field] for field in _FACTORS[result])
        bias, spec, count = numbers.get("b"), self.results[number], self._processors_count

        def enqueue(
            operands: Sequence[int], results: Sequence[int], workspace: int, stream: int
        ) -> None:
            plan.execute(operands[a], operands[b], results[number], workspace, stream)
            if bias is not None:
                kernels.add_bias(results[number], operands[bias], spec, stream, count)

        return enqueue

    def _sum(self, numbers: Mapping[str, int], number: int) -> _Enqueue:
        gy = numbers["gy"]
        spec = self.operands[gy]

        def enqueue(
            operands: Sequence[int], results: Sequence[int], _workspace: int, stream: int
        ) -> None:
            kernels.sum_gb(operands[gy], results[number], spec, stream)

        return enqueue
