"""What a call has in shared memory."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType

from deconvd.problem import TensorSpec
from deconvd.tensor import Array, message_from_spec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.late_copy import LateCopy
from deconvd_client.shared_memory.borrower import Borrower
from deconvd_client.shared_memory.region import Block

__all__ = ["SharedCall", "SharedResult"]


@dataclass(frozen=True, slots=True)
class SharedResult:
    """Memory for one result of a call.

    Attributes:
        place: Where it is, for the server.
        array: The memory. It is the result's once the call has ended well, and lives as long as any
            view of it.
    """

    place: pb.SharedSlice
    array: Array


class SharedCall:
    """What one call has in shared memory, from before its request until after its response: a context.

    If it is not known how the call ended, the server may still write its results: their memory is
    then not used again. The block must let the errors of deconvd.errors pass.

    Attributes:
        late_copy: What is still to be copied, once the server knows of the call; None if nothing is.
    """

    def __init__(self, borrower: Borrower) -> None:
        self.late_copy: LateCopy | None = None
        self._borrower = borrower
        self._kept: list[Array] = []
        self._blocks: list[Block] = []
        self._copies: list[tuple[Array, Array]] = []

    def is_large(self, tensor: Array | TensorSpec) -> bool:
        """Return whether shared memory pays for a tensor."""
        return self._borrower.is_large(tensor)

    def place(self, array: Array, *, may_be_late: bool = False) -> pb.SharedSlice | None:
        """Return where in shared memory an array lies, or will once `settle` was called; None if there is no room.

        Args:
            may_be_late: Whether its copy may be left to `late_copy`.
        """
        place = self._borrower.locate(array) or self._copied(array, may_be_late=may_be_late)
        self._kept.append(array)
        return place

    def tensor(self, array: Array) -> pb.Tensor | None:
        """Return a message that says where in shared memory an array lies; None if it is better sent.

        That is if it is small, or there is no room for it.
        """
        place = self.place(array) if self.is_large(array) else None
        if place is None:
            return None
        message = message_from_spec(spec_of(array))
        message.shared.CopyFrom(place)
        return message

    def result(self, spec: TensorSpec) -> SharedResult | None:
        """Return memory for a result; None if it is better sent: it is small, or there is no room."""
        block = self._borrower.take_now(spec.nbytes) if self.is_large(spec) else None
        if block is None:
            return None
        self._blocks.append(block)
        return SharedResult(block.message, block.array(spec))

    def settle(self) -> None:
        """Return when the server may read and write what has a place, but for what is late."""
        copies, self._copies = self._copies, []
        self._borrower.place.settle(copies)

    def __enter__(self) -> SharedCall:
        self._borrower.ask()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is not None:
            self._borrower.note_failure(exc, {block.region for block in self._blocks})

    def _copied(self, array: Array, *, may_be_late: bool) -> pb.SharedSlice | None:
        block = self._borrower.take_now(array.nbytes)
        if block is None:
            return None
        copy = block.array(spec_of(array))
        if may_be_late and array.nbytes >= self._borrower.place.smallest_late_bytes:
            self.late_copy = LateCopy(copy, array)
        else:
            self._copies.append((copy, array))
        self._kept.append(copy)
        return block.message
