"""Deconvolutions of tensors that arrive and leave in slices of samples.

A slice is computed while the next one arrives and the last one leaves. gW and gb are sums over the slices, in their
order, in the compute type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deconvd.dtypes import DType
from deconvd.errors import ExhaustedError, InvalidArgumentError
from deconvd.operation import spec_of_field
from deconvd.parts import Elements, elements_part, slices
from deconvd.problem import Problem, TensorSpec, problem_of
from deconvd.tensor import Array
from deconvd_server.arrivals import Arrivals
from deconvd_server.call import Call
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine import Engine
from deconvd_server.exchange import new_results
from deconvd_server.requests import ParsedRequest

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
        x, W, geometry = self.problem.x, self.problem.W, self.problem.geometry
        for part in slices(self.problem.n, self.slice_samples_count):
            shape = (part.stop - part.start, *x.shape[1:])
            yield part, problem_of(TensorSpec(shape, x.dtype), W, geometry)

    def _largest(self) -> Problem:
        """Return the problem of the first slice; that of all if there is none."""
        return next((problem for _, problem in self.slices()), self.problem)

    def footprint_bytes(self, parsed: ParsedRequest) -> int:
        """Return what a stream of it holds of host memory: what is whole, sums, and slices in flight."""
        operation, first = parsed.operation, self._largest()
        whole_bytes = sliced_bytes = 0
        for field, spec in (*parsed.operands.items(), *parsed.results.items()):
            if field in operation.constants:
                whole_bytes += spec.nbytes
            elif field in operation.summed:  # that of the slices so far, and that of the next
                wide_bytes = spec.nbytes * self.problem.compute_type.itemsize // spec.dtype.itemsize
                whole_bytes += 2 * wide_bytes
            else:
                sliced_bytes += spec_of_field(first, field).nbytes
        return whole_bytes + min(self.slices_count, SLICES_IN_FLIGHT + 1) * sliced_bytes

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
        parsed: What is to be computed.
        operands: From what.
        kept: Where results go that are kept, by the names of their fields.
        executor: Has a thread for each slice in flight.
    """

    parsed: ParsedRequest
    sliced: SlicedProblem
    engine: Engine
    operands: Arrivals
    kept: Mapping[str, DeviceTensor]
    executor: Executor
    call: Call

    def results(self) -> Iterator[Elements]:
        """Yield the elements of results, in the stream's order, while those of operands arrive; not of what is kept.

        Raises as `Arrivals` and `Engine.run` do.
        """
        operation, specs = self.parsed.operation, self.parsed.results
        summed = {field: specs[field] for field in operation.summed if field in specs}
        sums = _Sums(summed, self.parsed.problem.compute_type)
        for arrays in _in_flight(self._begin_slices(), self.call):
            sums.add(arrays)
            for field in arrays:
                if field in operation.results:
                    yield elements_part(arrays[field])
        for field, total in sums.totals().items():
            if field in self.kept:
                self.engine.write(self.kept[field], total, self.call)
            else:
                yield elements_part(total)

    def _begin_slices(self) -> Iterator[Future[dict[str, Array]]]:
        """Begin each slice once its operands have come."""
        operation, given = self.parsed.operation, self.parsed.operands
        constants = {f: self.operands.whole(f) for f in operation.constants if f in given}
        sliced = [field for field in operation.sliced if field in given]
        for part, problem in self.sliced.slices():
            operands = {field: self.operands.samples(field, part) for field in sliced}
            yield self._begin_slice(part, problem, {**constants, **operands})
        self.operands.expect_end()

    def _begin_slice(
        self, part: slice, problem: Problem, operands: Mapping[str, Tensor]
    ) -> Future[dict[str, Array]]:
        """Have a slice computed while the next arrives; at once if there is no next."""
        if self.sliced.slices_count > 1:
            return self.executor.submit(self._run, part, problem, operands)
        done: Future[dict[str, Array]] = Future()
        done.set_result(self._run(part, problem, operands))
        return done

    def _run(
        self, part: slice, problem: Problem, operands: Mapping[str, Tensor]
    ) -> dict[str, Array]:
        """Compute a slice, and return those results that are not where they are kept."""
        operation, options = self.parsed.operation, self.parsed.options
        kept = {
            field: tensor.samples(part.start, part.stop)
            for field, tensor in self.kept.items()
            if field in operation.results
        }
        sent = {f: spec_of_field(problem, f) for f in self.parsed.wanted if f not in kept}
        arrays = new_results(problem, sent)
        self.engine.run(operation, problem, operands, {**kept, **arrays}, options, self.call)
        return arrays


class _Sums:
    """The sums over the slices so far, in the compute type, by the names of their fields.

    Args:
        specs: What they will be.
    """

    def __init__(self, specs: Mapping[str, TensorSpec], compute_type: DType) -> None:
        self._specs = specs
        self._compute_type = compute_type
        self._totals: dict[str, Array] = {}

    def add(self, arrays: Mapping[str, Array]) -> None:
        """Add those of one slice, which are nobody else's."""
        for field in self._specs:
            if field in self._totals:
                self._totals[field] += arrays[field]
            else:
                self._totals[field] = arrays[field].astype(self._compute_type, copy=False)

    def totals(self) -> dict[str, Array]:
        """Return the sums of all slices, in their own types; zeros if there was none."""
        if not self._totals:
            return {field: np.zeros(spec.shape, spec.dtype) for field, spec in self._specs.items()}
        return {
            field: total.astype(self._specs[field].dtype, copy=False)
            for field, total in self._totals.items()
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
