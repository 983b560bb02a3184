"""Memory that the caller of one call gives for its results, and how much of the call has travelled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from google.protobuf.message import Message

from deconvd.host.parallel_copy import copy_into
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd.wire.stream_parts import ElementsPart, PartSource, PendingElements, Uint8Array

__all__ = ["CountedSource", "Transfer"]

_STEP_BYTES: Final = 4 << 20
"""How often bytes are counted. Smaller parts would make a stream slower."""


class Transfer:
    """Where the results of one call go, and how many bytes have been sent and received. Any thread can ask.

    What travels in shared memory, or in one message, is not counted: nothing is seen of it until the call ends.

    Args:
        memory: For each result, by the names of their fields, an array that it is written to: C-contiguous, and of the
            byte order of `Tensor.raw`. What it holds after a failure is arbitrary.
    """

    def __init__(self, memory: Mapping[str, Array]) -> None:
        self._memory = memory
        self.begin_attempt()

    def begin_attempt(self) -> None:
        """Count from 0: the call is made, or made again."""
        # lists, because several threads add to them: `append` is atomic, and needs no lock
        self._sent: list[int] = []
        self._received: list[int] = []

    @property
    def sent_bytes(self) -> int:
        """How many bytes of operands were sent in this attempt; fewer than they have if they travel packed."""
        return sum(self._sent)

    @property
    def received_bytes(self) -> int:
        """How many bytes of results were received in this attempt."""
        return sum(self._received)

    def add_sent(self, size_bytes: int) -> None:
        """Count bytes that were sent."""
        self._sent.append(size_bytes)

    def add_received(self, size_bytes: int) -> None:
        """Count bytes that were received."""
        self._received.append(size_bytes)

    def array(self, field: str) -> Array:
        """Return the memory for a result."""
        return self._memory[field]

    def empty(self, field: str) -> Callable[[TensorSpec], Array]:
        """Return a function that returns the memory for a result, as a `PartReader` calls it."""
        return lambda spec: self._memory[field].view(spec.dtype)

    def count_parts(self, parts: Iterable[ElementsPart]) -> Iterator[ElementsPart]:
        """Yield the same elements, in parts that are small enough to be counted one by one."""
        for part in parts:
            for piece in part.pieces(_STEP_BYTES):
                yield piece
                self.add_sent(len(piece.data))

    def collect(self, arrays: Mapping[str, Array]) -> None:
        """Copy those results into the memory that have come elsewhere."""
        for field, array in arrays.items():
            target = self._memory[field]
            if array.ctypes.data != target.ctypes.data:
                copy_into(target, array)


class CountedSource:
    """The parts of a response, which are counted as they arrive. See `PartSource`."""

    def __init__(self, source: PartSource, transfer: Transfer) -> None:
        self.is_buffered: bool = source.is_buffered
        self._source = source
        self._transfer = transfer

    def next(self) -> Message | PendingElements | None:
        """Return the next part. None at the end."""
        return self._source.next()

    def read_into(self, target: Uint8Array) -> None:
        """Fill `target` with the next of the pending elements."""
        for begin in range(0, len(target), _STEP_BYTES):
            step = target[begin : begin + _STEP_BYTES]
            self._source.read_into(step)
            self._transfer.add_received(len(step))
