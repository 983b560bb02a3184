"""Operations on arrays that lie on the card already: stream-ordered, without a wait of the host."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

from deconvd.errors import InvalidArgumentError
from deconvd.options import Options
from deconvd.problem import Problem
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.device import CudaDevice
from deconvd_server.device.cuda.plan import Operation, Plan
from deconvd_server.device.cuda.plans import PlanKey
from deconvd_server.device.cuda.runtime import CudaError, Graph

__all__ = ["DeviceArray", "Operator"]

_ALIGNMENT_BYTES = 16
_GRAPHS_COUNT = 256


class DeviceArray(Protocol):
    """An array on the card, such as cupy's: C-contiguous, NCHW."""

    @property
    def data(self) -> object:
        """Has the address as `ptr`."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A plan's key and where its operands lie: what a captured graph serves."""

    key: PlanKey
    a: int
    b: int
    out: int


class Operator:
    """Runs operations on the card's own arrays, from captured graphs where they come again.

    Serves one thread and one stream. bfloat16 arrays may have any two-byte type.

    Args:
        stream: The CUDA stream that everything is enqueued on.
    """

    def __init__(self, device: CudaDevice, stream: int) -> None:
        self._device = device
        self._stream = stream
        self._own_stream = device.new_stream()
        self._leases = ExitStack()
        self._plans: dict[PlanKey, Plan] = {}
        self._workspace = ExitStack()
        self._workspace_pointer = 0
        self._workspace_bytes = 0
        self._graphs: OrderedDict[_Request, Graph | None] = OrderedDict()

    def run(
        self,
        operation: Operation,
        problem: Problem,
        a: DeviceArray,
        b: DeviceArray,
        out: DeviceArray,
        options: Options,
    ) -> None:
        """Enqueue an operation. The first of its kind waits until a plan is chosen.

        Args:
            a, b, out: As in `Plan.execute`, aligned to 16 bytes.

        Raises:
            InvalidArgumentError: The problem has no products, or an array is not aligned.
            ExhaustedError: The card has not the memory.
        """
        pointers = [int(array.data.ptr) for array in (a, b, out)]  # type: ignore[attr-defined]
        if not problem.has_products or any(p % _ALIGNMENT_BYTES for p in pointers):
            raise InvalidArgumentError("arrays must have elements, and be aligned to 16 bytes")
        request = _Request(self._device.key(operation, problem, options), *pointers)
        with self._device.using():
            self._run(request)

    def plan_name(self, operation: Operation, problem: Problem, options: Options) -> str:
        """Return the name of the plan that serves an operation."""
        with self._device.using():
            return self._plan(self._device.key(operation, problem, options)).name

    def close(self) -> None:
        """Wait for the card and free plans, graphs and workspace."""
        with self._device.using():
            self._own_stream.wait()
            self._graphs.clear()
            self._leases.close()
            self._workspace.close()

    def _run(self, request: _Request) -> None:
        if request not in self._graphs:
            plan = self._plan(request.key)
            self._reserve(plan.workspace_bytes)
            self._execute(request, self._stream)  # once without: kernels are loaded by this
            self._graphs[request] = self._captured(request)
            if len(self._graphs) > _GRAPHS_COUNT:
                self._graphs.popitem(last=False)
            return
        graph = self._graphs[request]
        if graph is None:
            self._execute(request, self._stream)
        else:
            graph.launch(self._stream)

    def _execute(self, request: _Request, stream: int) -> None:
        plan = self._plans[request.key]
        plan.execute(request.a, request.b, request.out, self._workspace_pointer, stream)

    def _captured(self, request: _Request) -> Graph | None:
        own = self._own_stream
        try:
            return own.capture(lambda: self._execute(request, own.pointer))
        except (CudaError, CudnnError):
            return None

    def _plan(self, key: PlanKey) -> Plan:
        plan = self._plans.get(key)
        if plan is None:
            lease = self._device.plans.lease(key, self._own_stream, lambda: None)
            plan = self._plans[key] = self._leases.enter_context(lease)
        return plan

    def _reserve(self, size_bytes: int) -> None:
        """Have a workspace of at least so many bytes. Graphs that hold a smaller one are dropped."""
        if size_bytes > self._workspace_bytes:
            self._device.wait()
            self._graphs.clear()
            self._workspace.close()
            self._workspace_pointer = self._workspace.enter_context(
                self._device.memory.take(size_bytes)
            )
            self._workspace_bytes = size_bytes
