"""Deconvolutions of tensors that arrive and leave in slices of samples.

A slice is computed while the next one arrives and the last one leaves. gW and gb are sums over the slices, in their
order, in the compute type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from deconvd.errors import ExhaustedError, InvalidArgumentError
from deconvd.gradients import Gradients, Wanted
from deconvd.options import Options
from deconvd.parts import Elements, elements_part, slices
from deconvd.problem import Problem, TensorSpec
from deconvd.tensor import Array
from deconvd_server.arrivals import Arrivals
from deconvd_server.call import Call
from deconvd_server.device import DeviceTensor, Operand
from deconvd_server.engine import Engine
from deconvd_server.exchange import Exchange

__all__ = ["SLICES_IN_FLIGHT", "SlicedProblem", "Slices"]

_T = TypeVar("_T")

_SLICE_BYTES = 64 << 20
"""What every server takes, so that clients need not ask first."""

SLICES_IN_FLIGHT = 2
"""One is computed while the next arrives, and the one before leaves."""


@dataclass(frozen=True, slots=True)
class SlicedProblem:
    """A problem whose samples come a slice at a time.

    Attributes:
        slice_samples_count: Samples of a slice, from 1; the last may have fewer.

    Raises:
        InvalidArgumentError: `slice_samples_count` is less than 1.
    """

    problem: Problem
    slice_samples_count: int

    def __post_init__(self) -> None:
        if self.slice_samples_count < 1:
            raise InvalidArgumentError(
                f"slice_samples_count must be at least 1, got {self.slice_samples_count}",
                argument="slice_samples_count",
            )

    @property
    def slices_count(self) -> int:
        """How many slices there are."""
        return -(-self.problem.n // self.slice_samples_count)

    def slices(self) -> Iterator[tuple[slice, Problem]]:
        """Yield each slice of samples, and its problem."""
        x = self.problem.x
        for part in slices(self.problem.n, self.slice_samples_count):
            shape = (part.stop - part.start, *x.shape[1:])
            yield part, replace(self.problem, x=TensorSpec(shape, x.dtype))

    def _largest(self) -> Problem:
        """Return the problem of the first slice; that of all if there is none."""
        return next((problem for _, problem in self.slices()), self.problem)

    def footprint_bytes(self, wanted: Wanted | None) -> int:
        """Return what a stream of it holds of host memory: W, its gradient, and slices in flight."""
        whole = self.problem
        first = self._largest()
        slice_bytes = first.x.nbytes * (2 if wanted and wanted.gx else 1) + first.y.nbytes
        wide_bytes = whole.W.nbytes * whole.compute_type.itemsize // whole.W.dtype.itemsize
        sums_bytes = 2 * wide_bytes if wanted and wanted.gW else 0
        held_count = min(self.slices_count, SLICES_IN_FLIGHT + 1)
        return whole.W.nbytes + sums_bytes + held_count * slice_bytes

    def check_slice(self, message_bytes: int) -> None:
        """Raise ExhaustedError if a slice of several samples is larger than the contract allows.

        Args:
            message_bytes: The largest message.
        """
        limit_bytes = max(message_bytes, _SLICE_BYTES)
        first = self._largest()
        slice_bytes = first.x.nbytes + first.y.nbytes
        if self.slice_samples_count > 1 and slice_bytes > limit_bytes:
            raise ExhaustedError(
                f"a slice of {self.slice_samples_count} samples has {slice_bytes} bytes, and the "
                f"server takes {limit_bytes}: send fewer samples at a time"
            )


@dataclass(frozen=True, slots=True)
class Slices:
    """The slices of one call, computed as they arrive.

    Attributes:
        operands: What they are computed from.
        exchange: Where results go that are kept.
        executor: Has a thread for each slice in flight.
    """

    sliced: SlicedProblem
    options: Options
    engine: Engine
    operands: Arrivals
    exchange: Exchange
    executor: Executor
    call: Call

    def y(self, *, with_b: bool) -> Iterator[Elements]:
        """Yield the elements of y, unless it is kept, while those of x arrive.

        Raises as `Arrivals` and `Engine.deconvolve` do.
        """
        W = self.operands.whole("w")
        b = self.operands.whole("b") if with_b else None
        kept_y = self.exchange.tensor_of("y")

        def begun() -> Iterator[Future[Operand]]:
            for part, problem in self.sliced.slices():
                x = self.operands.samples("x", part)
                yield self._started(self._y_of, problem, x, W, b, _view(kept_y, part))
            self.operands.expect_end()

        for y in _in_flight(begun(), self.call):
            if isinstance(y, np.ndarray):
                yield elements_part(y)

    def _y_of(
        self, problem: Problem, x: Operand, W: Operand, b: Operand | None, out: Operand | None
    ) -> Operand:
        return self.engine.deconvolve(problem, x, W, b, self.options, self.call, out)

    def gradients(self, wanted: Wanted) -> Iterator[Elements]:
        """Yield the elements of gx while those of x and gy arrive, then those of gW and gb; not of what is kept.

        Raises as `Arrivals` and `Engine.gradients` do.
        """
        W = self.operands.whole("w") if wanted.gx else None
        kept_gx = self.exchange.tensor_of("gx")
        sums = _Sums(self.sliced.problem, wanted)

        def begun() -> Iterator[Future[Gradients]]:
            for part, problem in self.sliced.slices():
                x = self.operands.samples("x", part) if wanted.gW else None
                gy = self.operands.samples("gy", part)
                out = (_view(kept_gx, part), None, None)
                arguments = (problem, x, W, gy, wanted, self.options, self.call, out)
                yield self._started(self.engine.gradients, *arguments)
            self.operands.expect_end()

        for gradients in _in_flight(begun(), self.call):
            sums.add(gradients)
            if gradients.gx is not None:
                yield elements_part(gradients.gx)
        for field, total in sums.totals().items():
            kept = self.exchange.tensor_of(field)
            if kept is None:
                yield elements_part(total)
            else:
                self.engine.write(kept, total, self.call)

    def _started(self, work: Callable[..., _T], *arguments: Any) -> Future[_T]:
        """Have a slice computed while the next arrives; at once if there is no next."""
        if self.sliced.slices_count > 1:
            return self.executor.submit(work, *arguments)
        done: Future[_T] = Future()
        done.set_result(work(*arguments))
        return done


def _view(tensor: DeviceTensor | None, part: slice) -> DeviceTensor | None:
    """Return some samples of a tensor, if there is one."""
    return None if tensor is None else tensor.samples(part.start, part.stop)


class _Sums:
    """gW and gb of the slices so far, in the compute type."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        self._specs = {"gw": problem.W} if wanted.gW else {}
        self._specs |= {"gb": problem.b} if wanted.gb else {}
        self._compute_type = problem.compute_type
        self._totals: list[Array] = []

    def add(self, gradients: Gradients) -> None:
        """Add those of one slice, which are nobody else's."""
        present = [gradient for gradient in gradients[1:] if gradient is not None]
        if not self._totals:
            self._totals = [gradient.astype(self._compute_type, copy=False) for gradient in present]
            return
        for total, gradient in zip(self._totals, present, strict=True):
            total += gradient

    def totals(self) -> dict[str, Array]:
        """Return those that are wanted, in their own types, by the names of their fields."""
        totals = self._totals or [
            np.zeros(spec.shape, self._compute_type) for spec in self._specs.values()
        ]
        return {
            field: total.astype(spec.dtype, copy=False)
            for (field, spec), total in zip(self._specs.items(), totals, strict=True)
        }


def _in_flight(begun: Iterator[Future[_T]], call: Call) -> Iterator[_T]:
    """Yield the results of work in its order, some of it being done while others are begun.

    If anything fails, what is under way ends by itself, since the call has: its memory is held
    until then.
    """
    # An error holds this frame, which must hold no future that holds the error: no name for one.
    under_way: list[Future[_T]] = []
    try:
        while _add_next(begun, under_way):
            if len(under_way) == SLICES_IN_FLIGHT:
                yield under_way.pop(0).result()
        while under_way:
            yield under_way.pop(0).result()
    finally:
        if under_way:
            call.cancel()
            wait(under_way)
            under_way.clear()


def _add_next(begun: Iterator[Future[_T]], under_way: list[Future[_T]]) -> bool:
    """Begin the next piece of work; return False if there is none."""
    future = next(begun, None)
    if future is not None:
        under_way.append(future)
    return future is not None
