"""Deconvolutions of tensors that arrive and leave in slices of samples.

A slice is computed while the next one arrives and the last one leaves. gW and gb are sums over the slices, in their
order, in the compute type.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from deconvd.chunks import ChunkReader, chunks_of, slices
from deconvd.errors import ExhaustedError, InvalidArgumentError
from deconvd.gradients import Gradients, Wanted
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec
from deconvd.tensor import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.call import Call
from deconvd_server.engine import Engine

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

    def slices(self) -> Iterator[Problem]:
        """Yield the problem of each slice."""
        x = self.problem.x
        for part in slices(self.problem.n, self.slice_samples_count):
            shape = (part.stop - part.start, *x.shape[1:])
            yield replace(self.problem, x=TensorSpec(shape, x.dtype))

    def footprint_bytes(self, wanted: Wanted | None) -> int:
        """Return what a stream of it holds of host memory: W, its gradient, and slices in flight."""
        whole = self.problem
        first = next(self.slices(), whole)
        slice_bytes = first.x.nbytes * (2 if wanted and wanted.gx else 1) + first.y.nbytes
        wide_bytes = whole.W.nbytes * whole.compute_type.itemsize // whole.W.dtype.itemsize
        sums_bytes = 2 * wide_bytes if wanted and wanted.gW else 0
        slices_count = -(-whole.n // self.slice_samples_count)
        held_count = min(slices_count, SLICES_IN_FLIGHT + 1)
        return whole.W.nbytes + sums_bytes + held_count * slice_bytes

    def check_slice(self, message_bytes: int) -> None:
        """Raise ExhaustedError if a slice of several samples is larger than the contract allows.

        Args:
            message_bytes: The largest message.
        """
        limit_bytes = max(message_bytes, _SLICE_BYTES)
        first = next(self.slices(), self.problem)
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
        executor: Has a thread for each slice in flight.
    """

    sliced: SlicedProblem
    options: Options
    engine: Engine
    executor: Executor
    call: Call

    def y(
        self, reader: ChunkReader[pb.DeconvolveStreamRequest], *, with_b: bool
    ) -> Iterator[bytes]:
        """Yield the chunks of y while those of x arrive.

        Raises as `reader` and `Engine.deconvolve` do.
        """
        whole = self.sliced.problem
        W = reader.read("W", whole.W)
        b = reader.read("b", whole.b) if with_b else None

        def begun() -> Iterator[Future[Array]]:
            for problem in self.sliced.slices():
                x = reader.read("x", problem.x)
                yield self.executor.submit(self._y_of, problem, x, W, b)
            reader.expect_end()

        for y in _in_flight(begun(), self.call):
            yield from chunks_of(y)

    def _y_of(self, problem: Problem, x: Array, W: Array, b: Array | None) -> Array:
        return self.engine.deconvolve(problem, x, W, b, self.options, self.call)

    def gradients(
        self, reader: ChunkReader[pb.DeconvolveGradStreamRequest], wanted: Wanted
    ) -> Iterator[bytes]:
        """Yield the chunks of gx while those of x and gy arrive, then those of gW and gb.

        Raises as `reader` and `Engine.gradients` do.
        """
        whole = self.sliced.problem
        W = reader.read("W", whole.W) if wanted.gx else None
        sums = _Sums(whole, wanted)

        def begun() -> Iterator[Future[Gradients]]:
            for problem in self.sliced.slices():
                x = reader.read("x", problem.x) if wanted.gW else None
                gy = reader.read("gy", problem.y)
                arguments = (problem, x, W, gy, wanted, self.options, self.call)
                yield self.executor.submit(self.engine.gradients, *arguments)
            reader.expect_end()

        for gradients in _in_flight(begun(), self.call):
            sums.add(gradients)
            if gradients.gx is not None:
                yield from chunks_of(gradients.gx)
        for total in sums.totals():
            yield from chunks_of(total)


class _Sums:
    """gW and gb of the slices so far, in the compute type."""

    def __init__(self, problem: Problem, wanted: Wanted) -> None:
        self._specs = [problem.W] * wanted.gW + [problem.b] * wanted.gb
        self._totals = [np.zeros(spec.shape, problem.compute_type) for spec in self._specs]

    def add(self, gradients: Gradients) -> None:
        """Add those of one slice."""
        present = [gradient for gradient in gradients[1:] if gradient is not None]
        for total, gradient in zip(self._totals, present, strict=True):
            total += gradient

    def totals(self) -> list[Array]:
        """Return those that are wanted, in their own types."""
        return [
            total.astype(spec.dtype) for total, spec in zip(self._totals, self._specs, strict=True)
        ]


def _in_flight(begun: Iterator[Future[_T]], call: Call) -> Iterator[_T]:
    """Yield the results of work in its order, some of it being done while others are begun.

    If anything fails, what is under way ends by itself, since the call has: its memory is held
    until then.
    """
    under_way: list[Future[_T]] = []
    try:
        for future in begun:
            under_way.append(future)
            if len(under_way) == SLICES_IN_FLIGHT:
                yield under_way.pop(0).result()
        while under_way:
            yield under_way.pop(0).result()
    finally:
        if under_way:
            call.cancel()
            for future in under_way:
                future.exception()
