"""Measures calls by all ways in turn, beside their floors, so that a host that is slower for a while is so for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from deconvd.model.dtypes import DType
from deconvd_client.cli.bench_problems import (
    BenchLayer,
    BenchOperands,
    downlink_problem,
    smallest_problem,
    uplink_problem,
)
from deconvd_client.cli.bench_ways import BareCalls, BareMoves, BenchWay
from deconvd_client.cli.call_times import CallTimes

__all__ = ["BenchRow", "measure_rows"]

_T = TypeVar("_T")

_WARM_UPS: Final = 2
_LEAST_ROUNDS: Final = 3
_BURST_S: Final = 0.02
_BURST_CALLS: Final = 20
"""The most calls of one kind in a round, after one that does not count."""


@dataclass(frozen=True, slots=True)
class BenchRow:
    """What calls of one layer and element type take by one way. Its fields are those of the JSON file.

    Attributes:
        way: How tensors travel.
        x, W, y: Shapes.
        sent_bytes, received_bytes: Sizes of the operands and of the result.
        calls: How many calls were measured.
        ms: What a call takes: the mean of the middle half.
        parts_ms: Where that time goes, by `PARTS`. The sum is `ms`.
        smallest_ms: The least that a call takes whose operands and result have one element each.
        bytes_ms: The least that a bare program takes for the same bytes: a copy in memory, or a socket on this host.
        compute_ms: The least computing of all ways.
        floor_ms: `smallest_ms`, `bytes_ms` and `compute_ms`: what nothing is faster than.
        floors: How many floors the call takes.
    """

    way: str
    layer: str
    dtype: str
    x: Sequence[int]
    W: Sequence[int]
    y: Sequence[int]
    sent_bytes: int
    received_bytes: int
    calls: int
    ms: float
    parts_ms: Mapping[str, float]
    smallest_ms: float
    bytes_ms: float
    compute_ms: float
    floor_ms: float
    floors: float


def measure_rows(
    ways: Sequence[BenchWay],
    bare_moves: BareMoves,
    layer: BenchLayer,
    dtype: DType,
    time_s: float,
) -> Iterator[BenchRow]:
    """Yield a row for each way.

    Args:
        time_s: How long to measure. At least a few calls of each kind are made, however long they take.
    """
    problem = layer.problem(dtype)
    problems = {
        "whole": problem,
        "up": uplink_problem(problem),
        "down": downlink_problem(problem),
        "smallest": smallest_problem(dtype),
    }
    probes = {name: BenchOperands.of(each) for name, each in problems.items()}
    whole, y_bytes = probes["whole"], problem.y.nbytes
    with ExitStack() as stack:
        measurements = [
            _WayMeasurement(
                way, probes, stack.enter_context(bare_moves.calls(way.name, whole, y_bytes))
            )
            for way in ways
        ]
        began_s, rounds_count = time.perf_counter(), 0
        while rounds_count < _LEAST_ROUNDS or time.perf_counter() - began_s < time_s:
            for measurement in measurements:
                measurement.run_round()
            rounds_count += 1
    all_times = [measurement.typical_times() for measurement in measurements]
    # of the ways together: where stages overlap, a way's own share of the computing has more in it
    compute_ms = min(times["whole"].compute_ms for times in all_times)
    for measurement, times in zip(measurements, all_times, strict=True):
        smallest_ms, bytes_ms = measurement.smallest_ms(), measurement.bytes_ms()
        ms, floor_ms = times["whole"].total_ms, smallest_ms + bytes_ms + compute_ms
        yield BenchRow(
            way=measurement.way.name,
            layer=layer.name,
            dtype=str(dtype),
            x=problem.x.shape,
            W=problem.W.shape,
            y=problem.y.shape,
            sent_bytes=whole.nbytes,
            received_bytes=y_bytes,
            calls=measurement.calls_count,
            ms=ms,
            parts_ms=times["whole"].parts_ms(times["up"], times["down"], times["smallest"]),
            smallest_ms=smallest_ms,
            bytes_ms=bytes_ms,
            compute_ms=compute_ms,
            floor_ms=floor_ms,
            floors=ms / floor_ms,
        )


class _WayMeasurement:
    """What calls by one way, and its bare programs, have taken so far."""

    def __init__(self, way: BenchWay, probes: Mapping[str, BenchOperands], bare: BareCalls) -> None:
        self.way = way
        self._probes = probes
        self._bare = bare
        self._times: dict[str, list[CallTimes]] = {name: [] for name in probes}
        self._bare_ms: dict[str, list[float]] = {name: [] for name in bare}
        for operands in probes.values():
            for _ in range(_WARM_UPS):
                way.call(operands)

    @property
    def calls_count(self) -> int:
        """How many calls of the layer itself were measured."""
        return len(self._times["whole"])

    def run_round(self) -> None:
        """Make a few calls of each kind."""
        for name, operands in self._probes.items():
            self._times[name] += _burst(partial(self.way.call, operands))
        for name, move in self._bare.items():
            self._bare_ms[name] += _burst(partial(_time_ms, move))

    def typical_times(self) -> dict[str, CallTimes]:
        """Return the typical call of each kind."""
        return {name: CallTimes.typical(times) for name, times in self._times.items()}

    def smallest_ms(self) -> float:
        """Return the least that the smallest call has taken."""
        return min(each.total_ms for each in self._times["smallest"])

    def bytes_ms(self) -> float:
        """Return the least that a bare program has taken."""
        return min(min(times) for times in self._bare_ms.values())


def _burst(measure: Callable[[], _T]) -> list[_T]:
    """Measure one call that does not count, and then a few for a short time."""
    measure()
    measured: list[_T] = []
    began_s = time.perf_counter()
    while not measured or (
        len(measured) < _BURST_CALLS and time.perf_counter() - began_s < _BURST_S
    ):
        measured.append(measure())
    return measured


def _time_ms(move: Callable[[], None]) -> float:
    start_s = time.perf_counter()
    move()
    return (time.perf_counter() - start_s) * 1e3
