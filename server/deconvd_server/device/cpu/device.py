"""The CPU device: cuts a problem into independent tasks and shares them among threads."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from deconvd.errors import ExhaustedError, UnimplementedError
from deconvd.host.buffer_pool import BufferPool
from deconvd.host.machine import memory_bytes, processors_count
from deconvd.host.malloc import LARGE_BYTES
from deconvd.host.parallel_copy import copy_into
from deconvd.model.dtypes import Array
from deconvd.model.operation import Operation, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.device.array_pieces import piece_indices
from deconvd_server.device.arriving import Operand, require
from deconvd_server.device.cpu.blocking import (
    Blocking,
    Ranges,
    is_small,
    working_elements_count,
)
from deconvd_server.device.cpu.pace import Roofline
from deconvd_server.device.cpu.products import BlockProducts
from deconvd_server.device.cpu.team import Task, Team
from deconvd_server.device.cpu.tensor import (
    DEVICE_ID,
    HostTensor,
    array_of,
    as_host_tensor,
    make_contiguous_target,
)
from deconvd_server.device.departing import Place, target_of
from deconvd_server.device.no_products import SUM_BYTES, bytes_without_products, set_gb
from deconvd_server.device.protocol import CacheState, DeviceInfo
from deconvd_server.device.tensor import DeviceTensor, LentMemory
from deconvd_server.resources.budgets import budgets

__all__ = ["CpuDevice"]

_LRU_ENTRIES_COUNT = 2048
"""Problems whose footprints and blocks are remembered."""


class CpuDevice:
    """Computes on the processor. See `Device`.

    Two runs give the same bits, whatever the options: tasks share no output, and sums have a fixed order.

    Attributes:
        yield_turn: See `TimeSharedDevice`.

    Args:
        threads_count: Threads that compute for one call; by default one for each processor that this process may use.
        memory_limit_bytes: Bound on the memory that calls and residents take; by default three eighths of the
            machine's.
    """

    def __init__(
        self, threads_count: int | None = None, *, memory_limit_bytes: int | None = None
    ) -> None:
        self._budget_bytes = memory_limit_bytes or budgets().device_bytes
        self.yield_turn: Callable[[CallContext], None] = lambda _: None
        self._team = Team(threads_count or processors_count(), _ignore_out_of_range)
        # Memory of freed tensors is kept for the next ones. The allocator itself keeps only smaller blocks.
        self._memory = BufferPool(budgets().pool_bytes, smallest_bytes=LARGE_BYTES)
        # every call needs its footprint, and most problems come again
        self._sizes = lru_cache(_LRU_ENTRIES_COUNT)(self._count_bytes)
        self._blocking = lru_cache(_LRU_ENTRIES_COUNT)(Blocking.of)
        # The team's threads each call BLAS. Threads of BLAS's own would only compete with them for the processors.
        threadpool_limits(1, user_api="blas")
        self._roofline = Roofline(self._team.threads_count)

    @property
    def info(self) -> DeviceInfo:
        """See `DeviceInfo`."""
        return DeviceInfo(
            id=DEVICE_ID,
            name=_processor_name(),
            memory_bytes=memory_bytes(),
            threads_count=self._team.threads_count,
            budget_bytes=self._budget_bytes,
            calls_count=self._team.threads_count,
            has_wide_sums=True,
        )

    @property
    def waiting_since_s(self) -> float:
        """Never: products are made of pieces, and calls are checked in between."""
        return math.inf

    @property
    def caches(self) -> Sequence[CacheState]:
        """None: a processor has no plans to keep."""
        return ()

    def wait_until_warm(self) -> None:
        """Do nothing: a processor loads no libraries at need."""

    def footprint_bytes(
        self,
        operation: Operation,
        problem: Problem,
        operands: Collection[str],
        results: Collection[str],
        resident_bytes: int = 0,
    ) -> int:
        """Return a bound on the memory that a call takes in addition to its residents.

        It counts operands and results, W and y in the compute type, the blocks of each thread, and the partial sums of
        gW.
        """
        tensors_bytes, working_bytes = self._sizes(problem, tuple(operands), tuple(results))
        return max(tensors_bytes - resident_bytes, 0) + working_bytes

    def _count_bytes(
        self, problem: Problem, operands: Sequence[str], results: Sequence[str]
    ) -> tuple[int, int]:
        """Return the size of a call's tensors, and of the memory that it works in."""
        specs = [spec_of_field(problem, field) for field in (*operands, *results)]
        tensors_bytes = sum([spec.nbytes for spec in specs])
        if not problem.has_products:
            return tensors_bytes, bytes_without_products(problem, operands, results)
        elements_count = max([self._wide_elements_count(problem, field) for field in results])
        elements_count += self._team.threads_count * working_elements_count(problem)
        working_bytes = elements_count * problem.compute_type.itemsize
        return tensors_bytes, working_bytes + SUM_BYTES * ("gb" in results)

    def _wide_elements_count(self, problem: Problem, result: str) -> int:
        """Return a bound on the elements in the compute type that a result needs, without the blocks of the threads."""
        W_count = math.prod(problem.W.shape)
        match result:
            case "y":  # W cast, and y as it is summed
                return W_count + math.prod(problem.y.shape)
            case "gx":  # W cast
                return W_count
            case "gw":  # partial sums, and the products that are added to them
                return 2 * W_count * self._parts_count(problem)
        return 0

    def _parts_count(self, problem: Problem) -> int:
        """Return a bound on the parts of the samples that each have their own sum of gW."""
        threads_count = self._team.threads_count
        tasks_count = max(min(threads_count, problem.c_O), 1)  # at least that many in each part
        return min(-(-threads_count // tasks_count), problem.n)

    def min_duration_s(self, problem: Problem, results: Collection[str]) -> float:
        """Return a bound below the seconds that a call takes. See `TimeSharedDevice`."""
        return self._roofline.min_duration_s(problem, results)

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, Place],
        options: Options,
        call: CallContext,
    ) -> None:
        """Compute results into their places. See `Device`. `options` matter to cards only."""
        set_result = {"y": self._set_y, "gx": self._set_gx, "gw": self._set_gW, "gb": self._set_gb}
        arrays = {
            field: operand if isinstance(operand, np.ndarray) else array_of(require(operand))
            for field, operand in operands.items()
        }
        try:
            with _time_compute(call):
                for field, place in places.items():
                    target = array_of(target_of(place))
                    result = make_contiguous_target(target)
                    set_result[field](result, problem, arrays, call)
                    if result is not target:
                        copy_into(target, result)
        except MemoryError:
            raise ExhaustedError(
                f"the server has no memory for x {problem.x}, W {problem.W}, y {problem.y}"
            ) from None

    def _set_y(
        self, y: Array, problem: Problem, operands: Mapping[str, Array], call: CallContext
    ) -> None:
        blocking = self._blocking(problem, threads_count=self._threads_count(problem))
        x, W, b = operands["x"], operands["w"], operands.get("b")
        products = BlockProducts(problem, blocking, call, x=x, W=W, b=b)
        tasks = (
            products.set_y(y, samples, groups, channels)
            for samples in blocking.samples
            for groups in blocking.groups
            for channels in blocking.channels
        )
        counts = (len(blocking.samples), len(blocking.groups), len(blocking.channels))
        self._run_tasks(tasks, math.prod(counts), problem, call)

    def _set_gx(
        self, gx: Array, problem: Problem, operands: Mapping[str, Array], call: CallContext
    ) -> None:
        blocking = self._blocking(problem, threads_count=self._threads_count(problem))
        products = BlockProducts(problem, blocking, call, W=operands["w"], gy=operands["gy"])
        tasks = (
            products.set_gx(gx, samples, groups, image)
            for samples in blocking.samples
            for groups in blocking.groups
            for image in blocking.images()
        )
        images_count = len(blocking.h_pixels) * len(blocking.w_pixels)
        tasks_count = len(blocking.samples) * len(blocking.groups) * images_count
        self._run_tasks(tasks, tasks_count, problem, call)

    def _set_gW(
        self, gW: Array, problem: Problem, operands: Mapping[str, Array], call: CallContext
    ) -> None:
        threads_count = self._threads_count(problem)
        blocking = self._blocking(problem, threads_count=threads_count, sums_samples=True)
        # If groups, channels and taps make too few tasks, samples make more: each part of them has a sum of its own.
        taps_count = len(blocking.h_taps) * len(blocking.w_taps)
        tasks_count = len(blocking.groups) * len(blocking.channels) * taps_count
        parts = _parts(len(blocking.samples), -(-threads_count // tasks_count))
        sums = np.zeros((len(parts), *problem.W.shape), problem.compute_type)
        products = BlockProducts(problem, blocking, call, x=operands["x"], gy=operands["gy"])
        tasks = (
            products.add_to_gW(total, part, groups, channels, h_taps, w_taps)
            for total, part in zip(sums, parts, strict=True)
            for groups in blocking.groups
            for channels in blocking.channels
            for h_taps, w_taps in products.tap_blocks()
        )
        self._run_tasks(tasks, len(parts) * tasks_count, problem, call)
        self._run_tasks(iter([_sum_parts(gW, sums, call)]), 1, problem, call)

    def _set_gb(
        self, gb: Array, problem: Problem, operands: Mapping[str, Array], call: CallContext
    ) -> None:
        self._run_tasks(
            iter([_check_each_step(set_gb(gb, operands["gy"]), call)]), 1, problem, call
        )

    def _threads_count(self, problem: Problem) -> int:
        return 1 if is_small(problem) else self._team.threads_count

    def _run_tasks(
        self, tasks: Iterator[Task], tasks_count: int, problem: Problem, call: CallContext
    ) -> None:
        """Do tasks: those of a small problem in this thread alone, others with helpers, in turns with other calls."""
        if not is_small(problem):
            self._team.run(tasks, tasks_count, lambda: self.yield_turn(call))
            return
        for task in tasks:
            for _ in task:
                pass

    def empty(self, spec: TensorSpec) -> HostTensor:
        """Return a new tensor. See `Device`."""
        try:
            return HostTensor(self._memory.empty(spec), spec=spec)
        except MemoryError:
            raise ExhaustedError(f"the server has no memory for {spec}") from None

    def free(self, tensor: DeviceTensor) -> None:
        """Give the memory of a tensor back. See `Device`."""
        as_host_tensor(tensor).free()

    def write(self, tensor: DeviceTensor, array: Array, call: CallContext) -> None:
        """Copy an array into a tensor. See `Device`."""
        call.check()
        copy_into(as_host_tensor(tensor).array, array)

    def read(self, tensor: DeviceTensor, call: CallContext, out: Array | None = None) -> Array:
        """Return a tensor's elements. See `Device`."""
        call.check()
        array = np.empty(tensor.spec.shape, tensor.spec.dtype) if out is None else out
        copy_into(array, as_host_tensor(tensor).array)
        return array

    def allocate_host_array(self, spec: TensorSpec, *, is_lasting: bool = False) -> Array:
        """Return a new array. All host memory is alike to a processor."""
        try:
            return np.empty(spec.shape, spec.dtype)
        except MemoryError:
            raise ExhaustedError(f"the server has no memory for {spec}") from None

    def lend(self, size_bytes: int) -> LentMemory:
        """Raise UnimplementedError: only a card's memory can be lent. See `Device`."""
        raise UnimplementedError(f"{DEVICE_ID} cannot lend memory: only a card can, such as cuda:0")

    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Do nothing: a processor reaches all host memory alike."""
        return lambda: None

    def close(self) -> None:
        """End the threads."""
        self._team.close()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parts(blocks_count: int, parts_count: int) -> Ranges:
    """Return the ranges of blocks of `parts_count` parts, or fewer."""
    return Ranges(blocks_count, -(-blocks_count // parts_count))


def _sum_parts(gW: Array, sums: Array, call: CallContext) -> Task:
    """Set gW to the total of the parts' sums, in the order of the parts."""
    for piece in piece_indices(gW.shape):
        call.check()
        some = sums[:, *piece]
        gW[piece] = some[0] if len(some) == 1 else np.add.reduce(some, axis=0)
        yield


def _check_each_step(task: Task, call: CallContext) -> Task:
    """Return a task that checks the call before each step of another task."""
    call.check()
    for _ in task:
        yield
        call.check()


def _ignore_out_of_range() -> None:
    """Let numpy return infinities and NaN in this thread without a warning: they are results like others."""
    np.seterr(all="ignore")


@contextmanager
def _time_compute(call: CallContext) -> Iterator[None]:
    """Add the duration of a with-block to the call's ledger."""
    begin_s = time.perf_counter()
    try:
        with np.errstate(all="ignore"):  # see _ignore_out_of_range
            yield
    finally:
        call.ledger.add(Stage.COMPUTE, time.perf_counter() - begin_s)
