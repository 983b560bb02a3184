"""Trying plans out on scratch operands: whether they run, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from deconvd.model.dtypes import DType
from deconvd_server.device.cuda.api.memory import BlockLayout, DeviceMemory
from deconvd_server.device.cuda.api.runtime import CudaError, Event, Stream, copy, upload
from deconvd_server.device.cuda.cudnn import CudnnError
from deconvd_server.device.cuda.plan import Plan
from deconvd_server.device.cuda.plans.casting import operands_of, result_of
from deconvd_server.device.cuda.plans.key import PlanKey

__all__ = ["PlanTimer", "open_plan_timer"]

_NOISE_BYTES = 1 << 20
_BATCH_MS = 0.5
"""How long one timing takes at least: several times what an event is off by."""

_LAUNCH_MS = 0.1
"""What a single execution may seem to take because the host is slow to launch it."""

_LONG_MS = 300.0
"""Nobody is to wait for a second execution of what took so long."""

_MAX_REPEATS = 50
_TIMINGS_COUNT = 5


@dataclass(frozen=True, slots=True)
class PlanTimer:
    """A request's operands, as noise, and room for its result and a workspace.

    Attributes:
        a, b, out, workspace: Addresses on the card.
        stream: What plans are tried on.
    """

    a: int
    b: int
    out: int
    workspace: int
    stream: Stream

    def can_run(self, plan: Plan) -> bool:
        """Return whether a plan can be executed."""
        return self._first_run_ms(plan) < float("inf")

    def time_ms(self, plan: Plan, *, give_up_ms: float) -> float:
        """Return how long an execution takes on the card, in milliseconds; infinity if it fails.

        Args:
            give_up_ms: A plan that took longer than this once is not timed more precisely.
        """
        tried_ms = self._first_run_ms(plan)
        if tried_ms > _LONG_MS:
            return tried_ms
        once_ms = self._measure_ms(lambda: self._execute(plan))
        if once_ms > max(give_up_ms, _LAUNCH_MS):
            return once_ms
        repeats = min(max(int(_BATCH_MS / once_ms), 1), _MAX_REPEATS)
        try:
            # one launch for all repeats, so that it is the card that is timed and not the host
            graph = self.stream.capture(lambda: self._repeat(plan, repeats))
        except (CudaError, CudnnError):
            return once_ms
        times = [
            self._measure_ms(lambda: graph.launch(self.stream.pointer))
            for _ in range(_TIMINGS_COUNT)
        ]
        return min(times) / repeats

    def _first_run_ms(self, plan: Plan) -> float:
        """Return how long the first execution took the card; infinity if it fails.

        The time that the host took to enqueue it is left out: it may have compiled a kernel, which
        is done once and would hide what the kernel takes.
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
    """Lend a bench for a key for the length of a with-block.

    Args:
        stream: What plans are tried on; nobody else uses it meanwhile.

    Raises:
        ExhaustedError: The card has not the memory.
    """
    specs = (*operands_of(key.product, key.problem), result_of(key.product, key.problem))
    regions = BlockLayout()
    parts = [regions.add(spec.nbytes) for spec in specs]
    parts.append(regions.add(workspace_bytes))
    with memory.lease(regions.total_bytes) as base:
        a, b, out, workspace = (base + part.offset for part in parts)
        for part, spec in zip(parts[:2], specs[:2], strict=True):
            _fill(base + part.offset, part.size_bytes, spec.dtype, stream)
        try:
            yield PlanTimer(a, b, out, workspace, stream)
        finally:
            stream.wait()


def _fill(target: int, size_bytes: int, dtype: DType, stream: Stream) -> None:
    """Set memory to noise: zeros would cost the card less power, and so time, than real operands."""
    noise = np.random.default_rng(0).standard_normal(_NOISE_BYTES // dtype.itemsize).astype(dtype)
    filled = min(size_bytes, _NOISE_BYTES)
    upload(target, noise.view(np.uint8)[:filled], stream.pointer)
    while filled < size_bytes:
        more = min(filled, size_bytes - filled)
        copy(target + filled, target, more, stream.pointer)
        filled += more
    stream.wait()
