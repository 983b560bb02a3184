"""The CPU device: cuts a problem into independent tasks and shares them among threads."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TypeVarTuple

import numpy as np
from threadpoolctl import threadpool_limits

from deconvd.errors import ExhaustedError
from deconvd.gradients import Gradients, Wanted
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec
from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device.cpu.blocking import Blocking, ranges, working_elements_count
from deconvd_server.device.cpu.products import Products
from deconvd_server.device.cpu.team import Team
from deconvd_server.device.protocol import CacheState, DeviceInfo
from deconvd_server.ledger import Stage

__all__ = ["CpuDevice"]

T = TypeVarTuple("T")


class CpuDevice:
    """Computes on the processor. See `Device`.

    Two runs give the same bits, whatever the options: tasks share no output and sums have a fixed
    order.

    Args:
        threads_count: Threads that compute for one call; by default, one for each processor that
            the process may use.
        memory_limit_bytes: What calls may take of its memory; by default, all of it.
    """

    def __init__(
        self, threads_count: int | None = None, *, memory_limit_bytes: int | None = None
    ) -> None:
        self._memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self._budget_bytes = memory_limit_bytes or self._memory_bytes
        self._team = Team(threads_count or len(os.sched_getaffinity(0)))
        # The threads are ours: BLAS's own would only compete with them for the processors.
        threadpool_limits(1, user_api="blas")

    @property
    def info(self) -> DeviceInfo:
        """What the processor is."""
        return DeviceInfo(
            id="cpu",
            name=_processor_name(),
            memory_bytes=self._memory_bytes,
            threads_count=self._team.threads_count,
            budget_bytes=self._budget_bytes,
            calls_count=self._team.threads_count,
        )

    @property
    def caches(self) -> Sequence[CacheState]:
        """Nothing: a processor has no plans to make."""
        return ()

    def footprint_bytes(self, problem: Problem, wanted: Wanted | None) -> int:
        """Return a bound on the memory that a call takes.

        That is its operands and results, those in wider types, what each thread works on, and the
        partial sums of gW.
        """
        tensors = (problem.x, problem.W, problem.y)
        elements_count = sum(math.prod(spec.shape) for spec in tensors)
        working_count = self._team.threads_count * working_elements_count(problem)
        if wanted is not None and wanted.gW:
            working_count += self._gW_elements_count(problem)
        return (
            sum(spec.nbytes for spec in tensors)
            + elements_count * np.dtype(np.float64).itemsize
            + working_count * problem.compute_type.itemsize
        )

    def _gW_elements_count(self, problem: Problem) -> int:
        """Return a bound on the elements of gW's partial sums, and of the products added to them."""
        threads_count = self._team.threads_count
        tasks_count = max(min(threads_count, problem.c_O), 1)  # of each part, at least
        parts_count = min(-(-threads_count // tasks_count), problem.n)
        return 2 * parts_count * math.prod(problem.W.shape)

    def deconvolve(
        self, problem: Problem, x: Array, W: Array, b: Array | None, options: Options, call: Call
    ) -> Array:
        """Return y. `options` are for GPUs."""
        with self._computing(problem, call):
            y = _zeros(problem.y)
            if b is not None:
                y += b[:, None, None]
            if problem.has_products:
                blocking = Blocking.of(problem, threads_count=self._team.threads_count)
                products = Products(problem, blocking, call, x=x, W=W)
                self._run(
                    lambda *task: products.add_to_y(y, *task),
                    product(blocking.samples, blocking.groups, blocking.channels),
                )
            return y

    def gradients(
        self,
        problem: Problem,
        x: Array | None,
        W: Array | None,
        gy: Array,
        wanted: Wanted,
        options: Options,
        call: Call,
    ) -> Gradients:
        """Return the wanted gradients. `options` are for GPUs."""
        with self._computing(problem, call):
            return Gradients(
                gx=self._gx(problem, W, gy, call) if wanted.gx and W is not None else None,
                gW=self._gW(problem, x, gy, call) if wanted.gW and x is not None else None,
                gb=_gb(gy) if wanted.gb else None,
            )

    def _gx(self, problem: Problem, W: Array, gy: Array, call: Call) -> Array:
        gx = _zeros(problem.x)
        if problem.has_products:
            blocking = Blocking.of(problem, threads_count=self._team.threads_count)
            products = Products(problem, blocking, call, W=W, gy=gy)
            self._run(
                lambda *task: products.set_gx(gx, *task),
                product(blocking.samples, blocking.groups, blocking.images),
            )
        return gx

    def _gW(self, problem: Problem, x: Array, gy: Array, call: Call) -> Array:
        if not problem.has_products:
            return _zeros(problem.W)
        threads_count = self._team.threads_count
        blocking = Blocking.of(problem, threads_count=threads_count, sums_samples=True)
        # Where channels do not make tasks enough, samples do: each part of them has its own sum.
        tasks_count = len(blocking.groups) * len(blocking.channels) * len(blocking.taps)
        parts = _parts(blocking.samples, -(-threads_count // tasks_count))
        sums = np.zeros((len(parts), *problem.W.shape), problem.compute_type)
        products = Products(problem, blocking, call, x=x, gy=gy)
        self._run(
            lambda part, *task: products.add_to_gW(sums[part], parts[part], *task),
            product(range(len(parts)), blocking.groups, blocking.channels, blocking.taps),
        )
        gW: Array = np.add.reduce(sums, axis=0)
        return gW.astype(problem.W.dtype, copy=False)

    @contextmanager
    def _computing(self, problem: Problem, call: Call) -> Iterator[None]:
        with (
            call.ledger.timing(Stage.COMPUTE),
            _out_of_memory_as_error(problem),
            _out_of_range_as_infinite(),
        ):
            yield

    def _run(self, task: Callable[[*T], None], arguments: Iterable[tuple[*T]]) -> None:
        def quiet_task(*mine: *T) -> None:
            with _out_of_range_as_infinite():  # NumPy asks each thread anew
                task(*mine)

        self._team.run(quiet_task, arguments)

    def close(self) -> None:
        """End the threads."""
        self._team.close()


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _parts(blocks: list[slice], parts_count: int) -> list[list[slice]]:
    """Share blocks among so many parts, or fewer."""
    return [blocks[part] for part in ranges(len(blocks), -(-len(blocks) // parts_count))]


def _zeros(spec: TensorSpec) -> Array:
    return np.zeros(spec.shape, spec.dtype)


def _gb(gy: Array) -> Array:
    # Sums over whole batches lose digits in float32, and a column of gy is soon read.
    gb: Array = gy.sum(axis=(0, 2, 3), dtype=np.float64)
    return gb.astype(gy.dtype)


def _out_of_range_as_infinite() -> np.errstate:
    """Take a number beyond an element type's range for the result it is, and not for a fault to warn of."""
    return np.errstate(all="ignore")


@contextmanager
def _out_of_memory_as_error(problem: Problem) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise ExhaustedError(
            f"the server has not the memory for x {problem.x}, W {problem.W}, y {problem.y}"
        ) from None
