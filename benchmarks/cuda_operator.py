"""Our plans as an operator on arrays that are on a card already: stream-ordered, without a wait of the host."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any

from deconvd.errors import InvalidArgumentError
from deconvd.lru import Lru
from deconvd.model.options import Options
from deconvd.model.problem import Problem
from deconvd_server.device.cuda import kernels
from deconvd_server.device.cuda.api.memory import BlockLayout
from deconvd_server.device.cuda.api.runtime import CudaError, Event, Graph, Stream
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.device import CudaDevice
from deconvd_server.device.cuda.plan import OPERAND_ALIGNMENT_BYTES, Plan, Product

__all__ = ["Operator"]

_GRAPHS_COUNT = 256
"""Requests whose graphs are kept."""

_TRIES_COUNT = 3
"""Launches of each graph of which one is to be taken."""


class _Work:
    """What a request enqueues: once as it is, then as a graph.

    Args:
        plans: Each with the addresses of its a, b and out.
        extra: Enqueues what needs no plan on the stream that it is given.
    """

    def __init__(
        self, plans: list[tuple[Plan, int, int, int]], extra: Callable[[int], None]
    ) -> None:
        self._plans = plans
        self._extra = extra
        regions = BlockLayout()
        self._regions = [regions.add(plan.workspace_bytes) for plan, *_ in plans]
        self.workspace_bytes = regions.total_bytes
        self.graph: Graph | None = None

    @property
    def is_divisible(self) -> bool:
        """Whether parts of it may run side by side."""
        return len(self._plans) > 1

    def enqueue(self, workspace: int, streams: list[int]) -> None:
        """Enqueue everything: the first plan on the first stream, all else on the last."""
        for number, (plan, a, b, out) in enumerate(self._plans):
            stream = streams[min(number, len(streams) - 1)]
            plan.execute(a, b, out, workspace + self._regions[number].offset, stream)
        self._extra(streams[-1])


class Operator:
    """Runs operations on the card's own arrays, from captured graphs where they come again.

    Arrays are C-contiguous, NCHW, aligned to 16 bytes and have a cupy array's `data.ptr`; those of
    bfloat16 may have any two-byte type. Serves one thread and one stream.

    Args:
        stream: The CUDA stream that everything is enqueued on.
    """

    def __init__(self, device: CudaDevice, stream: int) -> None:
        self._device = device
        self._stream = stream
        self._own_stream = device.make_stream()
        self._side_stream = device.make_stream()
        self._workspace = ExitStack()
        self._workspace_pointer = 0
        self._workspace_bytes = 0
        self._works: Lru[Hashable, _Work] = Lru(_GRAPHS_COUNT)

    def run(
        self,
        operation: Product,
        problem: Problem,
        a: Any,
        b: Any,
        out: Any,
        options: Options,
    ) -> None:
        """Enqueue an operation. The first of its kind waits until a plan is chosen.

        Args:
            a, b, out: As in `Plan.execute`.

        Raises:
            InvalidArgumentError: The problem has no products, or an array is not aligned.
            ExhaustedError: The card has not the memory.
        """
        pointers = (a.data.ptr, b.data.ptr, out.data.ptr)

        def work() -> _Work:
            _check(problem, pointers)
            plan = self._plan(operation, problem, options)
            return _Work([(plan, *pointers)], lambda _: None)

        self._run((operation, problem, options, pointers), work)

    def run_gradients(
        self,
        problem: Problem,
        x: Any,
        W: Any,
        gy: Any,
        gx: Any,
        gW: Any,
        gb: Any | None,
        options: Options,
    ) -> None:
        """Enqueue all gradients; gb unless it is None. Otherwise as `run`."""
        at = tuple(array.data.ptr for array in (x, W, gy, gx, gW))
        at_gb = None if gb is None else gb.data.ptr

        def sum_gb(stream: int) -> None:
            if at_gb is not None:
                kernels.sum_gb(at[2], at_gb, problem.y, stream)

        def work() -> _Work:
            _check(problem, at)
            gx_plan = self._plan(Product.GX, problem, options)
            gW_plan = self._plan(Product.GW, problem, options)
            plans = [(gx_plan, at[2], at[1], at[3]), (gW_plan, at[0], at[2], at[4])]
            return _Work(plans, sum_gb)

        self._run((problem, options, at, at_gb), work)

    def plan_name(self, operation: Product, problem: Problem, options: Options) -> str:
        """Return the name of the plan that serves an operation."""
        with self._device.activate():
            return self._plan(operation, problem, options).name

    def close(self) -> None:
        """Wait for the card, and free graphs and workspace. The stream must still be there."""
        self._device.wait()
        self._works.clear()
        self._workspace.close()
        for stream in (self._stream, self._own_stream.pointer, self._side_stream.pointer):
            self._device.release_stream(stream)

    def _run(self, key: Hashable, make: Callable[[], _Work]) -> None:
        with self._device.activate():
            work = self._works.get(key)
            if work is None:
                self._begin(key, make())
            elif work.graph is None:
                work.enqueue(self._workspace_pointer, [self._stream])
            else:
                work.graph.launch(self._stream)

    def _begin(self, key: Hashable, work: _Work) -> None:
        """Enqueue new work, and capture it for the next time."""
        self._reserve(work.workspace_bytes)
        # once without a graph: what is loaded at first use cannot be captured
        work.enqueue(self._workspace_pointer, [self._stream])
        work.graph = self._capture(work)
        self._works.put(key, work)

    def _capture(self, work: _Work) -> Graph | None:
        """Return work as a graph, of what may run side by side in the arrangement that is faster.

        That is found out, since some of cuDNN's engines take half as long again beside some others.
        """
        main, side = self._own_stream, self._side_stream
        try:
            in_turn = main.capture(lambda: work.enqueue(self._workspace_pointer, [main.pointer]))
            if not work.is_divisible:
                return in_turn
            beside = main.capture(lambda: self._enqueue_forked(work, main, side))
        except (CudaError, CudnnError):
            return None
        return min((beside, in_turn), key=self._time_launch_ms)

    def _time_launch_ms(self, graph: Graph) -> float:
        """Return what a graph takes, which may be launched any number of times."""
        return min(self._time_one_launch_ms(graph) for _ in range(_TRIES_COUNT))

    def _time_one_launch_ms(self, graph: Graph) -> float:
        begin, end = Event(timing=True), Event(timing=True)
        begin.record(self._stream)
        graph.launch(self._stream)
        end.record(self._stream)
        end.wait()
        return end.ms_since(begin)

    def _enqueue_forked(self, work: _Work, main: Stream, side: Stream) -> None:
        main.fork(side)
        work.enqueue(self._workspace_pointer, [main.pointer, side.pointer])
        side.fork(main)

    def _plan(self, operation: Product, problem: Problem, options: Options) -> Plan:
        key = self._device.plan_key(operation, problem, options)
        return self._device.plans.get(key, lambda: None)

    def _reserve(self, size_bytes: int) -> None:
        """Have a workspace of at least so many bytes. Graphs that hold a smaller one are dropped."""
        if size_bytes > self._workspace_bytes:
            self._device.wait()
            self._works.clear()
            self._workspace.close()
            self._workspace_pointer = self._workspace.enter_context(
                self._device.memory.lease(size_bytes)
            )
            self._workspace_bytes = size_bytes


def _check(problem: Problem, pointers: tuple[int, ...]) -> None:
    if not problem.has_products or any(pointer % OPERAND_ALIGNMENT_BYTES for pointer in pointers):
        raise InvalidArgumentError("arrays must have elements, and be aligned to 16 bytes")
