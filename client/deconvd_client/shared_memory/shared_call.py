"""What a call has in shared memory."""

from __future__ import annotations

from types import TracebackType
from typing import Final, NamedTuple

from deconvd.problem import TensorSpec
from deconvd.shared_slice import SharedSlice
from deconvd.tensor import Array, message_from_spec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.deadline import Deadline
from deconvd_client.late_copy import LateCopy, Part
from deconvd_client.shared_memory.borrower import Borrower, has_ended
from deconvd_client.shared_memory.region import Block

__all__ = ["SharedCall", "SharedResult"]


_LATE_BYTES: Final = 1 << 20
"""What is smaller is copied at once: to tell of it takes as long."""


class SharedResult(NamedTuple):
    """Memory for one result of a call.

    Attributes:
        place: Where it is, for the server.
        array: The memory. It is the result's once the call has ended well, and lives as long as any
            view of it.
    """

    place: SharedSlice
    array: Array


class SharedCall:
    """What one call has in shared memory, from before its request until after its response: a context.

    If it is not known how the call ended, the server may still write its results: their memory is
    then not used again. The block must let the errors of deconvd.errors pass.

    Attributes:
        late_copy: What is still to be copied, once the server knows of the call; None if nothing is.

    Args:
        borrower: Where it has it from.
        deadline: Until when memory is waited for.
    """

    def __init__(self, borrower: Borrower, deadline: Deadline) -> None:
        self.late_copy: LateCopy | None = None
        self._borrower = borrower
        self._deadline = deadline
        self._kept: list[Array] = []
        self._blocks: list[Block] = []
        self._parts: list[Part] = []
        self._copied_bytes = 0

    def is_large(self, tensor: Array | TensorSpec) -> bool:
        """Return whether shared memory pays for a tensor."""
        return self._borrower.is_large(tensor)

    def place(self, array: Array) -> SharedSlice | None:
        """Return where in shared memory an array lies, or will once `settle` was called; None if there is no room."""
        place = self._borrower.locate(array)
        self._kept.append(array)
        if place is not None:
            self._parts.append(Part(array.nbytes, None))
            return place
        return self._place_of_copy(array)

    def tensor(self, array: Array) -> pb.Tensor | None:
        """Return a message that says where in shared memory an array lies; None if it is better sent.

        That is if it is small, or there is no room for it.
        """
        place = self.place(array) if self.is_large(array) else None
        if place is None:
            return None
        message = message_from_spec(spec_of(array))
        place.write_to(message.shared)
        return message

    def result(self, spec: TensorSpec) -> SharedResult | None:
        """Return memory for a result; None if there is no room."""
        block = self._borrower.take_now(spec.nbytes, self._deadline)
        if block is None:
            return None
        block.doubt()
        self._blocks.append(block)
        return SharedResult(block.place, block.array(spec))

    def settle(self, *, may_be_late: bool = False) -> None:
        """Return when the server may read and write what has a place.

        Args:
            may_be_late: Whether large copies may be left to `late_copy`.
        """
        place = self._borrower.place
        if not self._copied_bytes:
            place.settle(())
            return
        is_late = may_be_late and self._copied_bytes >= place.smallest_late_bytes
        at_once = [part for part in self._parts if not (is_late and _is_large(part))]
        place.settle([part.copy for part in at_once if part.copy is not None])
        if is_late:
            self.late_copy = LateCopy(
                [part if _is_large(part) else Part(part.size_bytes, None) for part in self._parts]
            )

    def __enter__(self) -> SharedCall:
        self._borrower.look_after_link()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None or has_ended(exc):
            for block in self._blocks:
                block.doubt(is_in_doubt=False)
        if exc is not None:
            self._borrower.note_failure(exc, {block.region for block in self._blocks})

    def _place_of_copy(self, array: Array) -> SharedSlice | None:
        block = self._borrower.take_now(array.nbytes, self._deadline)
        if block is None:
            return None
        copy = block.array(spec_of(array))
        self._parts.append(Part(array.nbytes, (copy, array)))
        self._copied_bytes += array.nbytes
        self._kept.append(copy)
        return block.place


def _is_large(part: Part) -> bool:
    return part.size_bytes >= _LATE_BYTES
