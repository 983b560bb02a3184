"""A plan as a list of steps: what each launches, and where its operands lie. Made without touching the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from deconvd_server.device.cuda.kernels.launch import Argument, Grid, Kernel, cuda, pointer
from deconvd_server.device.cuda.plan import Prepacking

__all__ = ["Clear", "Launch", "Operands", "Place", "Slot", "Step", "StepPlan", "Workspace"]

Operands = tuple[int, int, int, int]
"""Device pointers, by slot."""


class Slot(IntEnum):
    """What an execution is given: the two operands, the result and the workspace."""

    A = 0
    B = 1
    OUT = 2
    WORKSPACE = 3


@dataclass(frozen=True, slots=True)
class Place:
    """A place in what an execution is given, so many bytes behind its beginning."""

    slot: Slot
    offset_bytes: int = 0

    def address(self, operands: Operands) -> int:
        """Return the device pointer to it."""
        return operands[self.slot] + self.offset_bytes

    def plus(self, offset_bytes: int) -> Place:
        """Return the place so many bytes further on."""
        return Place(self.slot, self.offset_bytes + offset_bytes)


class Step(Protocol):
    """A part of a plan: what is enqueued for it depends on the operands' addresses alone."""

    def enqueue(self, operands: Operands, stream: int) -> None:
        """Enqueue it on a stream of the current device."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The launch of a kernel, which takes the addresses of `places` and then `constants`."""

    kernel: Kernel
    grid: Grid
    places: tuple[Place, ...]
    constants: tuple[Argument, ...]

    def enqueue(self, operands: Operands, stream: int) -> None:
        """Enqueue it on a stream of the current device."""
        addresses = (pointer(place.address(operands)) for place in self.places)
        self.kernel.launch(self.grid, (*addresses, *self.constants), stream)


@dataclass(frozen=True, slots=True)
class Clear:
    """Sets memory to zeros."""

    place: Place
    size_bytes: int

    def enqueue(self, operands: Operands, stream: int) -> None:
        """Enqueue it on a stream of the current device."""
        if self.size_bytes:
            cuda().runtime.memsetAsync(self.place.address(operands), 0, self.size_bytes, stream)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A `Plan` that enqueues its steps in order. None of our steps lets two runs differ.

    Attributes:
        prepare: Returns how b is prepared; see `Preparable`.
    """

    name: str
    workspace_bytes: int
    steps: tuple[Step, ...]
    prepare: Callable[[], Prepacking | None] = lambda: None

    def prepacking(self) -> Prepacking | None:
        """Return what is made of b before all else. See `Preparable`."""
        return self.prepare()

    @property
    def deterministic(self) -> bool:
        """Always: no step depends on the order in which threads run."""
        return True

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the steps. See `Plan`."""
        for step in self.steps:
            step.enqueue((a, b, out, workspace), stream)


class Workspace:
    """Lays out a plan's workspace: parts one behind the other, each aligned to 256 bytes."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def take(self, size_bytes: int) -> Place:
        """Return the place of a new part."""
        place = Place(Slot.WORKSPACE, self.size_bytes)
        self.size_bytes += -(-size_bytes // 256) * 256
        return place
