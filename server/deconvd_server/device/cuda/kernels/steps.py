"""A plan as a list of steps: kernel launches and cleared memory, with the buffers that they use. Needs no device."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from deconvd_server.device.cuda.kernels.launch import Argument, Grid, Kernel, cuda, pointer

__all__ = [
    "BufferOffset",
    "BufferSlot",
    "Clear",
    "Launch",
    "Operands",
    "PlanStep",
    "StepPlan",
    "Workspace",
]

Operands = tuple[int, int, int, int]
"""Device pointers of an execution, by `BufferSlot`."""


class BufferSlot(IntEnum):
    """The buffers of an execution: the two operands, the result and the workspace."""

    A = 0
    B = 1
    OUT = 2
    WORKSPACE = 3


@dataclass(frozen=True, slots=True)
class BufferOffset:
    """An offset in one of an execution's buffers."""

    slot: BufferSlot
    offset_bytes: int = 0

    def address(self, operands: Operands) -> int:
        """Return the device pointer to it in an execution."""
        return operands[self.slot] + self.offset_bytes

    def advance(self, offset_bytes: int) -> BufferOffset:
        """Return the offset that is that many bytes further on."""
        return BufferOffset(self.slot, self.offset_bytes + offset_bytes)


class PlanStep(Protocol):
    """A step of a plan. Only the operands' addresses differ from one execution to the next."""

    def enqueue(self, operands: Operands, stream: int) -> None:
        """Enqueue it on a stream of the current device."""


@dataclass(frozen=True, slots=True)
class Launch:
    """The launch of a kernel, whose arguments are the addresses of `buffers`, followed by `constants`."""

    kernel: Kernel
    grid: Grid
    buffers: tuple[BufferOffset, ...]
    constants: tuple[Argument, ...]

    def enqueue(self, operands: Operands, stream: int) -> None:
        """Enqueue it on a stream of the current device."""
        addresses = (pointer(buffer.address(operands)) for buffer in self.buffers)
        self.kernel.launch(self.grid, (*addresses, *self.constants), stream)


@dataclass(frozen=True, slots=True)
class Clear:
    """Sets memory to zeros."""

    buffer: BufferOffset
    size_bytes: int

    def enqueue(self, operands: Operands, stream: int) -> None:
        """Enqueue it on a stream of the current device."""
        if self.size_bytes:
            cuda().runtime.memsetAsync(self.buffer.address(operands), 0, self.size_bytes, stream)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """A `Plan` that enqueues its steps in order."""

    name: str
    workspace_bytes: int
    steps: tuple[PlanStep, ...]

    @property
    def deterministic(self) -> bool:
        """Always True: no step depends on the order in which threads run."""
        return True

    def execute(self, a: int, b: int, out: int, workspace: int, stream: int) -> None:
        """Enqueue the steps. See `Plan`."""
        for step in self.steps:
            step.enqueue((a, b, out, workspace), stream)


class Workspace:
    """Lays out a plan's workspace: regions one after the other, each aligned to 256 bytes."""

    def __init__(self) -> None:
        self.size_bytes = 0

    def take(self, size_bytes: int) -> BufferOffset:
        """Return a new region."""
        region = BufferOffset(BufferSlot.WORKSPACE, self.size_bytes)
        self.size_bytes += -(-size_bytes // 256) * 256
        return region
