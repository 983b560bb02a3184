"""Calls whose large tensors are in shared memory."""

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
from deconvd_client.calls.call_spec import CallResult, CallSpec
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy, SharedOperand
from deconvd_client.calls.tracing import current_call_span
from deconvd_client.calls.transport import OutcomeUnknownError
from deconvd_client.shared_memory.borrower import Borrower, has_call_ended
from deconvd_client.shared_memory.region import BorrowedBlock

__all__ = ["SharedCall", "SharedResult", "call_with_shared_memory"]

_MIN_OVERLAP_BYTES: Final = 1 << 20
"""A smaller operand is copied before the call: to report its progress takes as long as to copy it."""


class SharedResult(NamedTuple):
    """Memory for one result of a call.

    Attributes:
        shared_slice: Where it is, for the server.
        array: The memory. It holds the result once the call has succeeded, and lives as long as any view of it.
    """

    shared_slice: SharedSlice
    array: Array


class SharedCall:
    """The shared memory of one call: a context, entered before the request and left after the response.

    If it is not known how the call ended, the server may still write its results. Their memory is then never used
    again. The block must let the errors of deconvd.errors pass.

    Attributes:
        overlapped_copy: Copies that are left to be made once the server knows of the call; None if there are none.

    Args:
        borrower: Where the memory comes from.
        deadline: Until when the call waits for memory.
    """

    def __init__(self, borrower: Borrower, deadline: Deadline) -> None:
        self.overlapped_copy: OverlappedCopy | None = None
        self._borrower = borrower
        self._deadline = deadline
        self._shared_arrays: list[Array] = []  # the memory must stay until the server has read it
        self._result_blocks: list[BorrowedBlock] = []
        self._operands: list[SharedOperand] = []
        self._copied_bytes = 0

    def place_operand(self, array: Array, field: str = "") -> SharedSlice | None:
        """Return where the server finds an operand; None if there is no room for it.

        An array outside shared memory gets a place, and is copied there by `copy_operands`.

        Args:
            field: The operand's field, by which calls in a loop find its place again.
        """
        shared_slice = self._borrower.locate(array)
        if shared_slice is not None:
            self._shared_arrays.append(array)
            self._operands.append(SharedOperand(array.nbytes, None))
            return shared_slice
        block = self._borrower.allocate_unchecked(array.nbytes, self._deadline, field)
        if block is None:
            return None
        target = block.region.array(block, spec_of(array))
        self._shared_arrays.append(target)
        self._operands.append(SharedOperand(array.nbytes, (target, array)))
        self._copied_bytes += array.nbytes
        return block.shared_slice

    def operand_message(self, array: Array) -> pb.Tensor | None:
        """Return a message that says where in shared memory an operand is.

        None if the operand should be sent instead: it is small, or there is no room for it.
        """
        shared_slice = self.place_operand(array) if self._borrower.is_large(array) else None
        if shared_slice is None:
            return None
        message = message_from_spec(spec_of(array))
        shared_slice.write_to(message.shared)
        return message

    def allocate_result(self, spec: TensorSpec, field: str = "") -> SharedResult | None:
        """Return memory for a result; None if there is no room. The field is as for `place_operand`."""
        block = self._borrower.allocate_unchecked(spec.nbytes, self._deadline, field)
        if block is None:
            return None
        block.reference.is_in_doubt = True
        self._result_blocks.append(block)
        return SharedResult(block.shared_slice, block.region.array(block, spec))

    def copy_operands(self, *, may_overlap: bool = False) -> None:
        """Return once the server may read the operands and write the results.

        Args:
            may_overlap: Whether large copies may be left to `overlapped_copy`.
        """
        kind = self._borrower.memory_kind
        is_overlapped = may_overlap and self._copied_bytes >= kind.min_overlap_bytes
        copies: list[tuple[Array, Array]] = []
        left: list[SharedOperand] = []
        for operand in self._operands:
            if is_overlapped and operand.size_bytes >= _MIN_OVERLAP_BYTES:
                left.append(operand)
                continue
            if operand.copy is not None:
                copies.append(operand.copy)
            left.append(SharedOperand(operand.size_bytes, None))
        kind.copy_and_synchronize(copies)
        if is_overlapped:
            self.overlapped_copy = OverlappedCopy(left)

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
            for block in self._result_blocks:
                block.reference.is_in_doubt = False
        if exc is not None:
            self._borrower.note_failure(exc, {block.region for block in self._result_blocks})


def call_with_shared_memory(
    borrower: Borrower, rpc: Callable[..., CallResult], call_spec: CallSpec
) -> CallResult | None:
    """Make a call and return its result.

    None if the call must be made in another way: no tensor is large, or there is no room for a large one, or the
    server does not know the memory.

    Args:
        rpc: Makes the call, as `Stub.call` does.

    Raises:
        UnavailableError, ExhaustedError: There is no other way, as `Borrower.check_fallback` says.
    """
    min_bytes = borrower.memory_kind.min_tensor_bytes
    tensors: dict[str, Array | TensorSpec] = {**call_spec.operands, **call_spec.results}
    large: set[str] = set()
    for field, tensor in tensors.items():
        if tensor.nbytes >= min_bytes:
            large.add(field)
    if not large:
        return None
    try:
        try:
            result = _call_once(borrower, rpc, call_spec, large, is_brief=True)
        except OutcomeUnknownError:
            # in other memory, and by gRPC: the server may still write the results of the lost call for a while
            result = _call_once(borrower, rpc, call_spec, large, is_brief=False)
    except StaleRegionError:
        result = None
    if result is None:
        borrower.check_fallback()
    elif (span := current_call_span.get()) is not None:
        span.shares_memory = True
    return result


def _call_once(
    borrower: Borrower,
    rpc: Callable[..., CallResult],
    call_spec: CallSpec,
    large: Collection[str],
    *,
    is_brief: bool,
) -> CallResult | None:
    """Make a call whose large tensors are in shared memory; return None if there is no room for one of them."""
    request: Any = type(call_spec.request)()
    request.CopyFrom(call_spec.request)
    raw: dict[str, Buffer] = {}  # the elements of small operands, which are sent
    results: dict[str, Array] = {}
    may_overlap = False
    with SharedCall(borrower, call_spec.deadline) as call:
        for field in call_spec.operation.write_order:
            array = call_spec.operands.get(field)
            if array is None:
                continue
            if field not in large:
                raw[field] = elements_of(array)
                may_overlap = False
                continue
            shared_slice = call.place_operand(array, field)
            if shared_slice is None:
                return None
            shared_slice.write_to(getattr(request, field).shared)
            # a card can follow the copies if the operand that is written last comes sample by sample
            may_overlap = field in call_spec.operation.batched_operands
        # Results come last. While the caller has those of the call before, new ones go elsewhere. By then all operands
        # have their places of that call, which would otherwise be freed to make room.
        for field, result_spec in call_spec.results.items():
            if field in large:
                result = call.allocate_result(result_spec, field)
                if result is None:
                    return None
                result.shared_slice.write_to(getattr(request, f"{field}_place"))
                results[field] = result.array
        call.copy_operands(may_overlap=may_overlap)
        return rpc(
            call_spec,
            Envelope(request, raw),
            placed=results,
            overlapped_copy=call.overlapped_copy,
            is_brief=is_brief,
        )
