"""Operations on a device, or on an engine, that give new arrays unless they are told of places."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.gradients import Gradients
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, Operation, spec_of_field
from deconvd.model.options import Options
from deconvd.model.problem import Problem
from deconvd_server.call.context import CallContext
from deconvd_server.device import Departing, Device, DeviceInfo, Operand, Place, Tensor
from deconvd_server.device.arriving import ArrivalProgress, Arriving
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.engine.engine import Engine

__all__ = [
    "Departure",
    "FailingDevice",
    "GradientRequest",
    "HoldingDevice",
    "OverlappingCpuDevice",
    "Runner",
    "deconvolve",
    "gradients",
    "make_arriving",
    "runner",
]


class OverlappingCpuDevice(CpuDevice):
    """A processor that says that it overlaps transfers, as cards do: it gets operands that are arriving."""

    @property
    def info(self) -> DeviceInfo:
        """See `Device`."""
        return replace(super().info, overlaps_transfers=True)


class FailingDevice(CpuDevice):
    """A device of which every deconvolution raises `error`."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error

    def run(self, *args: Any) -> None:
        raise self.error


class HoldingDevice(CpuDevice):
    """A device that computes one call at a time, and holds each until it ends or is let go."""

    def __init__(self) -> None:
        super().__init__(1)
        self.let_go = threading.Event()

    def run(self, *args: Any) -> None:
        (call,) = (arg for arg in args if isinstance(arg, CallContext))
        while not self.let_go.wait(0.01):
            call.check()
        super().run(*args)


class Departure:
    """A result that leaves while it is computed, as whoever reads it sees it.

    Attributes:
        sizes_bytes: How many of its bytes it was told were final, each time.
        seen: These bytes, as they were then.
        place: Where to compute it.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        self.sizes_bytes: list[int] = []
        self.seen = b""
        self.place = Departing(array, self._on_written)

    def _on_written(self, size_bytes: int) -> None:
        self.seen += self.array.reshape(-1).view(np.uint8)[len(self.seen) : size_bytes].tobytes()
        self.sizes_bytes.append(size_bytes)


class Runner(Protocol):
    """What computes: a device, or an engine. See `Device.run`."""

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Operand],
        places: Mapping[str, Place],
        options: Options,
        call: CallContext,
    ) -> object: ...


def runner(device: Device, problem: Problem) -> Runner:
    """Return what computes a problem: the device, or an engine for it if there are no products."""
    return device if problem.has_products else Engine(device, waiting_count=0)


def make_arriving(progress: ArrivalProgress, *arrays: Array) -> list[Arriving]:
    """Return arrays as operands that come one behind the other."""
    begins = accumulate((array.nbytes for array in arrays), initial=0)
    return [Arriving(array, progress, begin) for array, begin in zip(arrays, begins, strict=False)]


@dataclass(frozen=True, slots=True)
class GradientRequest:
    """Which gradients are wanted: at least one."""

    gx: bool = True
    gW: bool = True
    gb: bool = True


def _result_names(wanted: GradientRequest) -> list[str]:
    """Return the names of the fields of gradients."""
    fields = {"gx": wanted.gx, "gw": wanted.gW, "gb": wanted.gb}
    return [field for field, is_wanted in fields.items() if is_wanted]


def deconvolve(
    runner: Runner,
    problem: Problem,
    x: Operand,
    W: Operand,
    b: Operand | None,
    options: Options,
    call: CallContext,
    out: Tensor | None = None,
) -> Array:
    """Return y: in a new array unless `out` says where to put it, which is returned if it is an array."""
    operands = {"x": x, "w": W} if b is None else {"x": x, "w": W, "b": b}
    new = np.full(problem.y.shape, 77, problem.y.dtype)
    place = new if out is None else out
    runner.run(DECONVOLVE, problem, operands, {"y": place}, options, call)
    return place if isinstance(place, np.ndarray) else new


def gradients(
    runner: Runner,
    problem: Problem,
    x: Operand | None,
    W: Operand | None,
    gy: Operand,
    wanted: GradientRequest,
    options: Options,
    call: CallContext,
    out: Mapping[str, Tensor] | None = None,
) -> Gradients:
    """Return the wanted gradients: in new arrays but for those that `out` has places for; None for one in a tensor."""
    given = {"x": x, "w": W, "gy": gy}
    operands = {field: operand for field, operand in given.items() if operand is not None}
    places: dict[str, Place] = {}
    for field in _result_names(wanted):
        spec = spec_of_field(problem, field)
        new = np.full(spec.shape, 77, spec.dtype)
        places[field] = new if out is None else out.get(field, new)
    runner.run(DECONVOLVE_GRAD, problem, operands, places, options, call)
    arrays = {f: place for f, place in places.items() if isinstance(place, np.ndarray)}
    return Gradients(*map(arrays.get, ("gx", "gw", "gb")))
