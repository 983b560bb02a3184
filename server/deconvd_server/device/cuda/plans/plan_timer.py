"""Tries plans out on scratch operands: whether they run, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain

import numpy as np

from deconvd.model.dtypes import ELEMENT_TYPES, DType
from deconvd_server.device.cuda.api.memory import BlockLayout, DeviceMemory
from deconvd_server.device.cuda.api.runtime import (
    Bytes,
    CudaError,
    Event,
    Stream,
    copy,
    upload,
)
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.plan import Plan
from deconvd_server.device.cuda.plans.casting import operands_of, result_of
from deconvd_server.device.cuda.plans.key import PlanKey

__all__ = ["PlanTimer", "open_plan_timer"]

_NOISE_BYTES = 1 << 20
"""Random bytes that are made on the host. Operands are filled with copies of them."""

_BATCH_MS = 0.5
"""Shortest duration of a timing: several times the error of an event."""

_LAUNCH_MS = 0.1
"""A single execution may seem to take this long only because the host is slow to launch it."""

_LONG_MS = 300.0
"""A plan whose first execution took longer than this is not executed again."""

_MAX_REPEATS = 50
"""The most executions in a timing."""

_TIMINGS_COUNT = 5
"""Timings of a plan, of which the shortest counts."""

_COMPARED_MS = 2.0
_COMPARED_RATIO = 2.0
"""A plan whose first execution took longer than the former, and that many times longer than another's, is not executed
again to compare them."""

_ROUNDS_COUNT = 2
"""Executions of each plan in a comparison, of which the shorter counts."""


@dataclass(slots=True)
class PlanTimer:
    """Room for a request's operands, for its result and for a workspace.

    Attributes:
        a, b, out, workspace: Addresses on the card.
        stream: Where plans are tried out.
        fill: Fills the operands with noise. Called before the first precise timing.
        is_filled: Whether it has been called.
    """

    a: int
    b: int
    out: int
    workspace: int
    stream: Stream
    fill: Callable[[], None]
    is_filled: bool = False

    def compare_ms(self, plans: Sequence[Plan]) -> list[float]:
        """Return how long each plan takes about, in milliseconds; infinity for those that fail.

        That takes a tenth of the time of `time_ms`: all plans are in one graph, and operands are whatever was in
        memory. It is good enough to tell which of a few plans is the fastest.
        """
        times_ms = [self._first_run_ms(plan) for plan in plans]
        ran_ms = [ms for ms in times_ms if ms < float("inf")]
        if len(ran_ms) <= 1:
            return times_ms
        most_ms = max(_COMPARED_RATIO * min(ran_ms), _COMPARED_MS)
        places = [place for place, ms in enumerate(times_ms) if ms <= min(most_ms, _LONG_MS)]
        again_ms = self._time_side_by_side([plans[place] for place in places]) if places else []
        for place, ms in zip(places, again_ms, strict=True):
            times_ms[place] = ms
        return times_ms

    def _time_side_by_side(self, plans: Sequence[Plan]) -> list[float]:
        """Return the milliseconds of plans that have run before, all timed in one launch."""
        rounds = [
            [(plan, Event(timing=True), Event(timing=True)) for plan in plans]
            for _ in range(_ROUNDS_COUNT)
        ]

        def work() -> None:
            for plan, start, end in chain.from_iterable(rounds):
                start.record(self.stream.pointer, in_graph=True)
                self._execute(plan)
                end.record(self.stream.pointer, in_graph=True)

        try:
            graph = self.stream.capture(work)
        except (CudaError, CudnnError):
            return [self._measure_ms(partial(self._execute, plan)) for plan in plans]
        graph.launch(self.stream.pointer)
        self.stream.wait()
        return [
            min(end.ms_since(start) for _, start, end in of_plan)
            for of_plan in zip(*rounds, strict=True)
        ]

    def can_run(self, plan: Plan) -> bool:
        """Return whether a plan can be executed."""
        return self._first_run_ms(plan) < float("inf")

    def time_ms(self, plan: Plan, *, give_up_ms: float) -> float:
        """Return how long an execution takes on the card, in milliseconds; infinity if it fails.

        Args:
            give_up_ms: A plan that takes longer than this in its second execution is not timed more precisely.
        """
        if not self.is_filled:
            self.fill()
            self.is_filled = True
        first_ms = self._first_run_ms(plan)
        if first_ms > _LONG_MS:
            return first_ms
        once_ms = self._measure_ms(lambda: self._execute(plan))
        if once_ms > max(give_up_ms, _LAUNCH_MS):
            return once_ms
        repeats = min(max(int(_BATCH_MS / once_ms), 1), _MAX_REPEATS)
        try:
            # All repeats are one launch: this times the card, not the host.
            graph = self.stream.capture(lambda: self._repeat(plan, repeats))
        except (CudaError, CudnnError):
            return once_ms
        times = [
            self._measure_ms(lambda: graph.launch(self.stream.pointer))
            for _ in range(_TIMINGS_COUNT)
        ]
        return min(times) / repeats

    def _first_run_ms(self, plan: Plan) -> float:
        """Return how long the first execution takes on the card; infinity if it fails.

        The time that the host takes to enqueue it is subtracted. The host may compile a kernel in it, which is done
        once and takes far longer than the kernel.
        """
        host_s = 0.0

        def work() -> None:
            nonlocal host_s
            start_s = time.perf_counter()
            self._execute(plan)
            host_s = time.perf_counter() - start_s

        try:
            return max(self._measure_ms(work) - host_s * 1e3, 0.0)
        except CudnnError:
            return float("inf")

    def _repeat(self, plan: Plan, times: int) -> None:
        for _ in range(times):
            self._execute(plan)

    def _execute(self, plan: Plan) -> None:
        plan.execute(self.a, self.b, self.out, self.workspace, self.stream.pointer)

    def _measure_ms(self, work: Callable[[], None]) -> float:
        start, end = Event(timing=True), Event(timing=True)
        start.record(self.stream.pointer)
        work()
        end.record(self.stream.pointer)
        end.wait()
        return end.ms_since(start)


@contextmanager
def open_plan_timer(
    memory: DeviceMemory, key: PlanKey, workspace_bytes: int, stream: Stream
) -> Iterator[PlanTimer]:
    """Return a timer for a key, for the length of a with-block.

    Args:
        stream: Where plans are tried out. Nobody else may use it meanwhile.

    Raises:
        ExhaustedError: The card has no memory for the operands, the result and the workspace.
    """
    specs = (*operands_of(key.product, key.problem), result_of(key.product, key.problem))
    regions = BlockLayout()
    parts = [regions.add(spec.nbytes) for spec in specs]
    parts.append(regions.add(workspace_bytes))
    with memory.lease_for_search(regions.total_bytes) as base:
        a, b, out, workspace = (base + part.offset for part in parts)

        def fill() -> None:
            for part, spec in zip(parts[:2], specs[:2], strict=True):
                _fill(base + part.offset, part.size_bytes, spec.dtype, stream)

        try:
            yield PlanTimer(a, b, out, workspace, stream, fill)
        finally:
            stream.wait()


def _fill(target: int, size_bytes: int, dtype: DType, stream: Stream) -> None:
    """Fill memory with noise. With zeros the card would need less power, and so be faster, than with real operands."""
    filled = min(size_bytes, _NOISE_BYTES)
    upload(target, _noise(dtype.name)[:filled], stream.pointer)
    while filled < size_bytes:
        more = min(filled, size_bytes - filled)
        copy(target + filled, target, more, stream.pointer)
        filled += more
    stream.wait()


@cache
def _noise(dtype_name: str) -> Bytes:
    """Return noise of an element type. It takes the host 5 to 20 ms to make, so all keys share it."""
    dtype = {known.name: known for known in ELEMENT_TYPES}[dtype_name]
    normal = np.random.default_rng(0).standard_normal(_NOISE_BYTES // dtype.itemsize)
    return normal.astype(dtype).view(np.uint8)
