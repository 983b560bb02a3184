"""Calls whose large tensors lie in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Final, NamedTuple

from deconvd.errors import StaleRegionError
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Buffer, Envelope
from deconvd.wire.shared_slice import SharedSlice
from deconvd.wire.tensor import elements_of, message_from_spec
from deconvd_client.calls.call_spec import CallResult, CallSpec, Request
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy, SharedOperand
from deconvd_client.calls.transport import OutcomeUnknownError
from deconvd_client.shared_memory.borrower import Borrower, has_call_ended
from deconvd_client.shared_memory.region import BorrowedBlock

__all__ = ["SharedCall", "SharedResult", "call_with_shared_memory"]

_MIN_OVERLAP_BYTES: Final = 1 << 20
"""What is smaller is copied at once: to tell of it takes as long."""


class SharedResult(NamedTuple):
    """Memory for one result of a call.

    Attributes:
        place: Where it is, for the server.
        array: The memory. It is the result's once the call has ended well, and lives as long as any
            view of it.
    """

    shared_slice: SharedSlice
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
        self.overlapped_copy: OverlappedCopy | None = None
        self._borrower = borrower
        self._deadline = deadline
        self._live_arrays: list[Array] = []
        self._blocks: list[BorrowedBlock] = []
        self._operands: list[SharedOperand] = []
        self._copied_bytes = 0

    def place_operand(self, array: Array) -> SharedSlice | None:
        """Return where in shared memory an array lies, or will once `settle` was called; None if there is no room."""
        placed = self._borrower.find_or_allocate(array, self._deadline)
        if placed is None:
            return None
        place, there = placed
        self._live_arrays.append(there)
        if there is array:
            self._operands.append(SharedOperand(array.nbytes, None))
        else:
            self._operands.append(SharedOperand(array.nbytes, (there, array)))
            self._copied_bytes += array.nbytes
        return place

    def operand_message(self, array: Array) -> pb.Tensor | None:
        """Return a message that says where in shared memory an array lies; None if it is better sent.

        That is if it is small, or there is no room for it.
        """
        place = self.place_operand(array) if self._borrower.is_large(array) else None
        if place is None:
            return None
        message = message_from_spec(spec_of(array))
        place.write_to(message.shared)
        return message

    def allocate_result(self, spec: TensorSpec) -> SharedResult | None:
        """Return memory for a result; None if there is no room."""
        block = self._borrower.allocate_unchecked(spec.nbytes, self._deadline)
        if block is None:
            return None
        block.mark_in_doubt()
        self._blocks.append(block)
        return SharedResult(block.shared_slice, block.array(spec))

    def copy_operands(self, *, may_be_late: bool = False) -> None:
        """Return when the server may read and write what has a place.

        Args:
            may_be_late: Whether large copies may be left to `late_copy`.
        """
        place = self._borrower.memory_kind
        if not self._copied_bytes:
            place.copy_and_synchronize(())
            return
        is_late = may_be_late and self._copied_bytes >= place.min_overlap_bytes
        at_once = [o for o in self._operands if not (is_late and _is_worth_overlapping(o))]
        place.copy_and_synchronize(
            [operand.copy for operand in at_once if operand.copy is not None]
        )
        if is_late:
            self.overlapped_copy = OverlappedCopy(
                [
                    o if _is_worth_overlapping(o) else SharedOperand(o.size_bytes, None)
                    for o in self._operands
                ]
            )

    def __enter__(self) -> SharedCall:
        self._borrower.check_link()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None or has_call_ended(exc):
            for block in self._blocks:
                block.mark_in_doubt(is_in_doubt=False)
        if exc is not None:
            self._borrower.note_failure(exc, {block.region for block in self._blocks})


def _is_worth_overlapping(operand: SharedOperand) -> bool:
    return operand.size_bytes >= _MIN_OVERLAP_BYTES


def call_with_shared_memory(
    borrower: Borrower, rpc: Callable[..., CallResult], asked: CallSpec
) -> CallResult | None:
    """Make a call and return its answer.

    None if it is to be made in another way: none of its tensors is large, or there is no room for
    one that is, or the server does not know the memory.

    Args:
        rpc: Makes the call, as `Stub.call` does.

    Raises:
        UnavailableError, ExhaustedError: There is no other way, as `Borrower.check_fallback` says.
    """
    tensors: dict[str, Array | TensorSpec] = {**asked.operands, **asked.results}
    large = {field for field, tensor in tensors.items() if borrower.is_large(tensor)}
    if asked.offered or not large:
        return None
    try:
        answered = _call_with_retry(borrower, rpc, asked, large)
    except StaleRegionError:
        answered = None
    if answered is None:
        borrower.check_fallback()
    return answered


def _call_with_retry(
    borrower: Borrower, rpc: Callable[..., CallResult], asked: CallSpec, large: Collection[str]
) -> CallResult | None:
    try:
        return _call_once(borrower, rpc, asked, large, is_brief=True)
    except OutcomeUnknownError:
        # in other memory, and by gRPC: the server may be writing the results of the lost call for a while yet
        return _call_once(borrower, rpc, asked, large, is_brief=False)


def _call_once(
    borrower: Borrower,
    rpc: Callable[..., CallResult],
    asked: CallSpec,
    large: Collection[str],
    *,
    is_brief: bool,
) -> CallResult | None:
    request: Any = type(asked.request)()
    request.CopyFrom(asked.request)
    with SharedCall(borrower, asked.deadline) as call:
        results = _place_results(call, request, asked, large)
        if results is None:
            return None
        raw = _place_operands(call, request, asked, large)
        if raw is None:
            return None
        call.copy_operands(may_be_late=_may_overlap(asked, large))
        # what is not in shared memory is small
        envelope = Envelope(request, raw)
        return rpc(
            asked, envelope, placed=results, late_copy=call.overlapped_copy, is_brief=is_brief
        )


def _place_results(
    call: SharedCall, request: Request, asked: CallSpec, large: Collection[str]
) -> dict[str, Array] | None:
    """Ask for the large results in shared memory; return the memory of each. None if there is no room."""
    results: dict[str, Array] = {}
    for field, spec in asked.results.items():
        if field in large:
            result = call.allocate_result(spec)
            if result is None:
                return None
            result.shared_slice.write_to(getattr(request, f"{field}_place"))
            results[field] = result.array
    return results


def _place_operands(
    call: SharedCall, request: Request, asked: CallSpec, large: Collection[str]
) -> dict[str, Buffer] | None:
    """Put the large operands into shared memory; return the others' elements. None if there is no room."""
    raw: dict[str, Buffer] = {}
    for field in asked.operation.write_order:
        array = asked.operands.get(field)
        if array is None:
            continue
        if field not in large:
            raw[field] = elements_of(array)
            continue
        place = call.place_operand(array)
        if place is None:
            return None
        place.write_to(getattr(request, field).shared)
    return raw


def _may_overlap(asked: CallSpec, large: Collection[str]) -> bool:
    """Return whether a card could follow copies of operands: one with samples is the last that is written."""
    written = [field for field in asked.operation.write_order if field in asked.operands]
    last = written[-1] if written else ""
    return last in asked.operation.batched_operands and last in large
