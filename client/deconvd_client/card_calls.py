"""Calls with cupy arrays: in memory of their own card if the server uses that card too, else through the host.

Imported only once a caller has passed a cupy array.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import cupy
import numpy as np
from cupy.cuda import runtime

from deconvd.host.forks import new_lock
from deconvd.lending.protocol import card_id
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd_client.calls.call_spec import CallSpec
from deconvd_client.calls.deadline import Deadline
from deconvd_client.dispatch import Dispatcher
from deconvd_client.frameworks.framework import host_array
from deconvd_client.residents import Call, Resident
from deconvd_client.shared_memory import Borrower
from deconvd_client.shared_memory.link import LendingUnsupportedError, Link, LinkLostError
from deconvd_client.shared_memory.region import BorrowedBlock, BorrowedRegion

__all__ = ["CardDispatcher"]


class CardDispatcher:
    """Makes calls that have cupy arrays, in memory that the server lends on their cards. Thread-safe.

    Args:
        dispatcher: Sends the calls.
        find_socket: As for `Borrower`.
        timeout_s: How long each call may take.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        find_socket: Callable[[Deadline], str],
        timeout_s: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._find_socket = find_socket
        self._timeout_s = timeout_s
        self._is_closed = False
        self._lock = new_lock()
        self._borrowers: dict[int, _CardBorrower] = {}

    def execute(self, call: Call, deadline: Deadline | None = None) -> dict[str, Array]:
        """Make a call whose results should be on a card. It waits for all work enqueued on the current stream.

        Args:
            deadline: As for `Dispatcher.execute`.

        Returns:
            Its results, by the names of their fields: cupy arrays on that card, or numpy arrays.

        Raises:
            LostTensorError: As `Dispatcher.execute` does.
        """
        with suppress(_CardUnavailableError), cupy.cuda.Device(call.results_like.device.id) as card:
            return self._execute_on_card(call, card.id, deadline or Deadline(self._timeout_s))
        return self._dispatcher.execute(call.with_host_arrays(), deadline)

    def close(self, deadline: Deadline) -> None:
        """Give back the memory that holds no arrays, and borrow no more."""
        with self._lock:
            self._is_closed = True
            borrowers = [*self._borrowers.values()]
        for borrower in borrowers:
            # memory with arrays stays open in this process, so the server must not free it yet
            borrower.give_back_unused(deadline)
            borrower.close()

    def _execute_on_card(self, call: Call, ordinal: int, deadline: Deadline) -> dict[str, Array]:
        """Make a call whose tensors are all on one card; operands that are elsewhere are copied there.

        Raises:
            _CardUnavailableError: The call must go through the host.
        """
        operands: dict[str, Array] = {
            field: operand
            for field, operand in call.operands.items()
            if not isinstance(operand, Resident)
        }
        tensors: list[Array | TensorSpec] = [*operands.values(), *call.results.values()]
        if len(operands) < len(call.operands) or not all(tensor.nbytes for tensor in tensors):
            raise _CardUnavailableError
        call_spec = CallSpec(
            call.operation, call.request, call.problem, operands, call.results, deadline
        )
        return self._dispatcher.send(call_spec, self._borrower(ordinal)).arrays

    def _borrower(self, ordinal: int) -> _CardBorrower:
        with self._lock:
            if ordinal not in self._borrowers:
                borrower = _CardBorrower(self._find_socket, memory_kind=_CardMemoryKind(ordinal))
                self._borrowers[ordinal] = borrower
                if self._is_closed:
                    borrower.close()
            return self._borrowers[ordinal]


class _CardUnavailableError(Exception):
    """A call cannot be made in memory of a card: it must go through the host."""


class _CardBorrower(Borrower):
    """A borrower of memory on a card. Its arrays cannot be sent in messages."""

    def check_fallback(self) -> None:
        """Raise _CardUnavailableError: the caller makes the call through the host."""
        raise _CardUnavailableError


class _CardMemoryKind:
    """Memory of a card, for cupy arrays. See `MemoryKind`."""

    min_tensor_bytes: Final = 1  # any size: to send it, it would have to be copied to the host
    min_overlap_bytes: Final = math.inf  # never: the card's own copies are too quick
    loss_message: Final = "cupy arrays go through the host"

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal
        self._id = card_id(bytes(runtime.getDeviceProperties(ordinal)["uuid"]))

    def borrow(self, link: Link, size_bytes: int) -> BorrowedRegion:
        """See `MemoryKind`."""
        reply = link.borrow_on_card(self._id, size_bytes)
        try:
            handle = bytes.fromhex(reply.text)
        except ValueError:
            raise LinkLostError("the server lent memory of a card without a handle") from None
        try:
            with cupy.cuda.Device(self._ordinal):
                address = runtime.ipcOpenMemHandle(handle)
        except runtime.CUDARuntimeError as error:
            link.give_back(reply.region)
            raise LendingUnsupportedError(
                f"the server's memory cannot be opened here: {error}"
            ) from None
        return _CardRegion(self._ordinal, reply.region, address, reply.size_bytes)

    def address(self, array: Array) -> int | None:
        """See `MemoryKind`."""
        if not isinstance(array, cupy.ndarray) or not array.flags.c_contiguous:
            return None
        address: int = array.data.ptr
        return address

    def copy_and_synchronize(self, copies: Sequence[tuple[Any, Array]]) -> None:
        """Make copies, and wait for the current stream, so that the server sees them. See `MemoryKind`."""
        for target, source in copies:
            self._copy(target, source)
        cupy.cuda.get_current_stream().synchronize()

    def _copy(self, target: Any, source: Array) -> None:
        if isinstance(source, cupy.ndarray) and source.device.id == self._ordinal:
            target[...] = source
        else:
            target.set(np.ascontiguousarray(host_array(source), target.dtype))


class _CardRegion(BorrowedRegion):
    """Memory of a card. It is open in this process for as long as an array is in it."""

    def __init__(self, ordinal: int, name: bytes, address: int, size_bytes: int) -> None:
        super().__init__(name, address, size_bytes)
        self._ordinal = ordinal
        self._close = weakref.finalize(self, _close_memory, ordinal, address)
        self._close.atexit = False  # CUDA may have been shut down by then

    def array(self, block: BorrowedBlock, spec: TensorSpec) -> Array:
        """See `BorrowedRegion`."""
        memory = cupy.cuda.UnownedMemory(
            self.address + block.offset, spec.nbytes, block, self._ordinal
        )
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        array: Array = cupy.ndarray(spec.shape, spec.dtype, pointer)
        return array

    def reuse(self, size_bytes: int, field: str = "") -> BorrowedBlock | None:
        """See `BorrowedRegion`. Wait for the card first: any stream may still be reading the array that has gone."""
        block = super().reuse(size_bytes, field)
        if block is not None:  # else nothing is reused, and there is nothing to wait for
            self._await_card()
        return block

    def collect(self) -> None:
        """Free the blocks that have gone, once the card has finished all work that was enqueued on them."""
        if self._dead_references:
            self._await_card()
        super().collect()

    def recover(self) -> None:
        """See `BorrowedRegion`. Wait for the card first, as `collect` does."""
        self._await_card()
        super().recover()

    def _await_card(self) -> None:
        with cupy.cuda.Device(self._ordinal) as card:
            card.synchronize()

    def unmap(self) -> None:
        """See `BorrowedRegion`."""
        self._close()


def _close_memory(ordinal: int, address: int) -> None:
    with (
        suppress(runtime.CUDARuntimeError),
        cupy.cuda.Device(ordinal),
    ):  # the server may have gone, and the memory with it
        runtime.ipcCloseMemHandle(address)
