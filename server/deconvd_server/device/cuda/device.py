"""The CUDA device: finds the plans of a call's products and runs the call on a lane."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

import deconvd
from deconvd.host.machine import processors_count
from deconvd.model.operation import DECONVOLVE, Operation
from deconvd.model.options import Options
from deconvd.model.problem import Problem
from deconvd_server.call.context import CallContext
from deconvd_server.device.arriving import Operand, peek_tensor, require_all
from deconvd_server.device.cuda.api.host_memory import RegisteredMemory
from deconvd_server.device.cuda.api.memory import DeviceMemory
from deconvd_server.device.cuda.api.memory_pool import CardMemoryPool
from deconvd_server.device.cuda.api.registered_pool import RegisteredPool
from deconvd_server.device.cuda.api.runtime import (
    Stream,
    card_waits,
    current_device,
    open_card,
    register_host,
    synchronize,
    unregister_host,
)
from deconvd_server.device.cuda.card_tensors import CardTensors
from deconvd_server.device.cuda.cudnn import Cudnn
from deconvd_server.device.cuda.error_translation import ErrorTranslation
from deconvd_server.device.cuda.execution.call_fields import CallFields, select_fields
from deconvd_server.device.cuda.execution.device_work import DeviceWork
from deconvd_server.device.cuda.execution.lane import (
    ARENA_BYTES,
    COPIED_BYTES,
    PINNED_BYTES,
    Lane,
)
from deconvd_server.device.cuda.execution.lane_pool import LanePool
from deconvd_server.device.cuda.execution.parts import count_parts, problem_of_part
from deconvd_server.device.cuda.memory_estimate import MemoryEstimate
from deconvd_server.device.cuda.plan import PRODUCTS, Plan, Product
from deconvd_server.device.cuda.plans.build_threads import BuildThreads
from deconvd_server.device.cuda.plans.candidates import Candidates
from deconvd_server.device.cuda.plans.cost_model import MEASURED_CAPABILITY, cost_model
from deconvd_server.device.cuda.plans.key import PlanKey
from deconvd_server.device.cuda.plans.later_searches import LaterSearches
from deconvd_server.device.cuda.plans.plan_cache import PlanCache
from deconvd_server.device.cuda.plans.plan_timer import open_plan_timer
from deconvd_server.device.cuda.plans.rehearsal import Rehearsal
from deconvd_server.device.cuda.plans.store import PlanStore
from deconvd_server.device.cuda.plans.tuner import Tuner
from deconvd_server.device.cuda.stats import CudaStats
from deconvd_server.device.departing import Departing, Place, target_of
from deconvd_server.device.faults import DeviceLostError, DeviceUnavailableError
from deconvd_server.device.protocol import CacheState, DeviceInfo
from deconvd_server.resources.budgets import budgets

__all__ = ["CudaDevice", "CudaLimits"]

_FREE_SHARE = 0.9
"""The part of the card's free memory that calls may take if no limit is given. CUDA needs the rest."""

_MAX_HELPERS_COUNT = 8
"""The most threads that copy within the host: about as many as it takes to keep up with the card's bus."""

_REHEARSAL_S = 1.0
"""How long `CudaDevice.wait_until_warm` waits. A rehearsal takes some 0.4 s, and longer if libraries are read from a
slow disk: the rest is then done while the server serves."""

_HOST_MEMORY = RegisteredMemory(register_host, unregister_host)
"""The registered memory of this process. All its cards share it, as registered memory is reached by all."""

_HOST_ARRAYS = RegisteredPool(budgets().registered_bytes)
"""The pool of arrays in registered memory, which all cards of this process share."""


@dataclass(frozen=True, slots=True)
class CudaLimits:
    """Limits of a device, other than the card's memory.

    Attributes:
        lanes_count: Calls that are computed at once.
        workspace_bytes: A plan's workspace may have this size, plus that of the problem's tensors; None for 1 GiB, or
            less on a small card.
        plans_bytes: Host memory for plans.
        tuning_s: How long the plans of one key are timed.
    """

    lanes_count: int = 4
    workspace_bytes: int | None = None
    plans_bytes: int = field(default_factory=lambda: budgets().pool_bytes)
    tuning_s: float = 5.0


class CudaDevice(CardTensors):
    """Computes on an NVIDIA card. See `Device`.

    Args:
        ordinal: The card's number, as in nvidia-smi and CUDA_VISIBLE_DEVICES.
        memory_limit_bytes: Bound on the card's memory that calls and residents take; None for nine tenths of the free
            memory.
        plan_store: Folder where choices of plans are stored; None to forget them with the process.
        on_lost: Called, from any thread, when the card must be reset, which only a new process recovers from.
        limits: Other limits; None for the default ones.
        parts_count: How many processes share the card's memory: without a limit, this one takes nine tenths of its
            part, or of what is free if that is less.

    Attributes:
        candidates: Makes the plans that the card could use.
        plans: The plans that it uses.

    Raises:
        DeviceUnavailableError: The card, its driver or cuDNN is missing or too old, or the memory limit is too small.
        OSError: The folder of plans cannot be made.
    """

    def __init__(
        self,
        ordinal: int,
        *,
        memory_limit_bytes: int | None = None,
        plan_store: Path | None = None,
        on_lost: Callable[[DeviceLostError], None] = lambda _: None,
        limits: CudaLimits | None = None,
        parts_count: int = 1,
    ) -> None:
        self._card = open_card(ordinal)
        self._id = f"cuda:{ordinal}"
        self._error_translation = ErrorTranslation(self._id, on_lost)
        self._limits = limits or CudaLimits()
        part_bytes = min(self._card.free_bytes, self._card.memory_bytes // parts_count)
        limit_bytes = memory_limit_bytes or int(part_bytes * _FREE_SHARE)
        self._budget_bytes = self._budget(limit_bytes)
        with current_device(ordinal):
            self._cudnn = Cudnn()
            self._pool = CardMemoryPool(limit_bytes)
            self.memory = DeviceMemory(
                self._budget_bytes,
                self._pool.allocate,
                allocate_resident=self._pool.allocate_resident,
                allocate_shared=self._pool.allocate_shared,
            )
            self._lanes = self._make_lanes()
            is_measured = self._card.capability == MEASURED_CAPABILITY
            self.candidates = Candidates(
                self._cudnn, self._card.processors_count, cost_model() if is_measured else None
            )
            build_threads = BuildThreads(ordinal, self._cudnn, self._limits.lanes_count)
            self.plans = self._make_plan_cache(plan_store, build_threads)
            self._rehearsal = Rehearsal(
                self._cudnn,
                self.candidates,
                build_threads,
                partial(open_plan_timer, self.memory),
                self._lanes.streams,
                lambda: self._lanes.are_idle,
            )
        self._memory_estimate = MemoryEstimate(
            self._budget_bytes,
            self._limits.lanes_count,
            self._limits.workspace_bytes,
            self._fallback_bytes,
        )
        self._host_arrays = _HOST_ARRAYS
        self._host_arrays.open()

    def _budget(self, limit_bytes: int) -> int:
        """Return the bytes that the lanes' arenas leave for calls and residents."""
        lanes_count = self._limits.lanes_count
        budget_bytes = limit_bytes - lanes_count * ARENA_BYTES
        if budget_bytes <= 0:
            raise DeviceUnavailableError(
                f"{self._id}: a memory limit of {limit_bytes} bytes is too small: "
                f"its {lanes_count} lanes take {ARENA_BYTES} bytes each"
            )
        return budget_bytes

    def _make_lanes(self) -> LanePool:
        lanes_count = self._limits.lanes_count
        helpers_count = min(processors_count(), _MAX_HELPERS_COUNT)
        self._helpers = ThreadPoolExecutor(helpers_count, thread_name_prefix=self._id)
        self._arenas = [self._pool.allocate(ARENA_BYTES) for _ in range(lanes_count)]
        return LanePool(
            [
                Lane(self._id, self.memory, arena.ptr, self._helpers, _HOST_MEMORY)
                for arena in self._arenas
            ]
        )

    def _make_plan_cache(self, folder: Path | None, build_threads: BuildThreads) -> PlanCache:
        origin: dict[str, str | int] = {
            "deconvd": deconvd.__version__,
            "cudnn": self._cudnn.version,
            "card": self._card.name,
            "capability": self._card.capability,
            "processors": self._card.processors_count,
        }
        return PlanCache(
            self.candidates,
            Tuner(
                self.candidates,
                partial(open_plan_timer, self.memory),
                tuning_limit_s=self._limits.tuning_s,
            ),
            build_threads,
            LaterSearches(
                f"{self._id}-later",
                lambda: self._lanes.calls_count,
                lambda: self._lanes.are_idle,
                self.activate,
            ),
            limit_bytes=self._limits.plans_bytes,
            store=None if folder is None else PlanStore(folder, origin),
        )

    def rehearse(self) -> None:
        """Have the libraries loaded, in the background, that the first calls need."""
        self._rehearsal.start(self._card.ordinal)

    def wait_until_warm(self) -> None:
        """Wait for the rehearsal, if there is one. See `Device`."""
        self._rehearsal.wait(_REHEARSAL_S)

    @property
    def info(self) -> DeviceInfo:
        """See `DeviceInfo`."""
        return DeviceInfo(
            id=self._id,
            name=self._card.name,
            memory_bytes=self._card.memory_bytes,
            threads_count=0,
            budget_bytes=self._budget_bytes,
            calls_count=self._limits.lanes_count,
            has_own_memory=True,
            overlaps_transfers=True,
            card=self._card.id,
        )

    @property
    def stats(self) -> CudaStats:
        """The plans and memory that the device holds now."""
        lanes_count = self._limits.lanes_count
        return CudaStats(
            plans=self.plans.stats,
            plans_limit_bytes=self._limits.plans_bytes,
            memory=self.memory.stats,
            held_bytes=self._pool.held_bytes(),
            held_for_calls_bytes=self._pool.held_for_calls_bytes(),
            held_limit_bytes=self._pool.limit_bytes,
            misses_count=self._pool.misses_count,
            pinned_count=lanes_count,
            pinned_bytes=lanes_count * PINNED_BYTES,
            host_buffers=self._host_arrays.cache_state,
        )

    @property
    def waiting_since_s(self) -> float:
        """See `Device`: calls wait for the card, and so do searches for plans."""
        return card_waits(self._card.ordinal).since_s

    @property
    def caches(self) -> Sequence[CacheState]:
        """Plans, and buffers that are kept for the next call."""
        return self.stats.caches

    def footprint_bytes(
        self,
        operation: Operation,
        problem: Problem,
        operands: Collection[str],
        results: Collection[str],
        resident_bytes: int = 0,
    ) -> int:
        """Return a bound on the card's memory that a call takes, including what it takes to try plans out.

        All operands and results of the problem are counted, even those that the call does not have.
        """
        # a small W and a small b that are on the card are copied to the call's block
        uncopied_bytes = max(resident_bytes - 2 * COPIED_BYTES, 0)
        return self._memory_estimate.footprint_bytes(problem, results, uncopied_bytes)

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, Place],
        options: Options,
        call: CallContext,
    ) -> None:
        """Compute results into their places. See `Device`."""
        used = select_fields(operation, tuple(places), tuple(operands))
        # y is computed in parts where the card reaches x and y. Gradients are computed in steps, which overlap too.
        addresses = None
        if operation is DECONVOLVE:
            x, y = peek_tensor(operands["x"]), target_of(places["y"])
            addresses = _HOST_MEMORY.addresses(x, y)
        parts_count = 1 if addresses is None else count_parts(problem)
        may_overlap = operation is not DECONVOLVE or parts_count > 1
        if not (may_overlap and self._lanes.are_idle):
            # A lane that waits for operands would take time from other calls. The engine calls again once all are
            # there.
            operands = require_all(operands)
        part = problem_of_part(problem, parts_count)
        with (
            self._lanes.lend(call) as lane,
            current_device(self._card.ordinal),
            self._error_translation,
        ):
            make_work = partial(self._make_work, operation, used, part, options, call)
            key = (operation, used, part, options)
            given = [operands[field] for field in used.operands]
            wanted = [places[field] for field in used.results]
            first = wanted[0]
            if (
                addresses is not None
                and parts_count > 1
                and isinstance(first, (np.ndarray, Departing))
            ):
                lane.run_in_parts(key, make_work, parts_count, given, first, addresses, call)
            else:
                lane.run(key, make_work, given, wanted, call)

    def _make_work(
        self,
        operation: Operation,
        used: CallFields,
        problem: Problem,
        options: Options,
        call: CallContext,
    ) -> DeviceWork:
        """Return the work of a call, with a plan for each product. It waits for plans that must be chosen first."""
        plans = {
            field: self._plan(PRODUCTS[field], problem, options, call)
            for field in used.results
            if field in PRODUCTS
        }
        count = self._card.processors_count
        return DeviceWork(operation, problem, used.operands, used.results, plans, count)

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Let the card read and write host memory by itself. See `Device`."""
        with current_device(self._card.ordinal):
            release = _HOST_MEMORY.register(address, size_bytes)

        def unregister() -> None:
            with current_device(self._card.ordinal):
                release()

        return unregister

    def plan_key(self, product: Product, problem: Problem, options: Options) -> PlanKey:
        """Return the key of a product's plan on this device."""
        limit_bytes = self._memory_estimate.workspace_limit_bytes(problem)
        return PlanKey.of(product, problem, options, limit_bytes)

    def _fallback_bytes(self, product: Product, problem: Problem) -> int:
        key = self.plan_key(product, problem, Options())
        return self.candidates.fallback(key).plan.workspace_bytes

    def _plan(
        self, product: Product, problem: Problem, options: Options, call: CallContext
    ) -> Plan:
        return self.plans.get(self.plan_key(product, problem, options), call.check)

    @contextmanager
    def _lend_lane(self, call: CallContext) -> Iterator[Lane]:
        """Lend a lane, with the card as the thread's device. Waits and raises as `LanePool.acquire`."""
        with self._lanes.lend(call) as lane, self.activate():
            yield lane

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Make the card the calling thread's device, and translate errors, for the length of a with-block."""
        with current_device(self._card.ordinal), self._error_translation:
            yield

    def wait(self) -> None:
        """Wait until the card has done all the work of this process."""
        with current_device(self._card.ordinal):
            synchronize()

    def release_stream(self, stream: int) -> None:
        """Destroy the cuDNN handle of a stream that is about to end: a later stream may get its address."""
        with current_device(self._card.ordinal):
            self._cudnn.destroy_handle(stream)

    def make_stream(self) -> Stream:
        """Return a new stream of the card. Its owner must call `release_stream` before the stream ends."""
        with current_device(self._card.ordinal):
            return Stream()

    def close(self) -> None:
        """Free all that the device holds. No call may be running, and none may follow."""
        with current_device(self._card.ordinal):
            for stream in self._lanes.close():
                self._cudnn.destroy_handle(stream)
            self._helpers.shutdown()
            self._rehearsal.close()
            self.plans.close()
            self._arenas.clear()  # collected, and so given back to the pool, before it is trimmed
            self._pool.trim()
        self._host_arrays.close()
