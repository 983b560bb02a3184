"""Calls with cupy arrays: on their own card where the server has it too, else by way of the host.

Imported once a caller has handed over a cupy array, and not before.
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
        calls: Makes calls, those with numpy arrays too.
        find_socket: As for `Borrower`.
        timeout_s: How long each call may take.
    """

    def __init__(
        self,
        calls: Dispatcher,
        find_socket: Callable[[Deadline], str],
        timeout_s: float,
    ) -> None:
        self._calls = calls
        self._find_socket = find_socket
        self._timeout_s = timeout_s
        self._is_closed = False
        self._lock = new_lock()
        self._borrowers: dict[int, _CardBorrower] = {}

    def execute(self, call: Call) -> dict[str, Array]:
        """Make a call whose results are wanted on a card, once what was enqueued on the current stream is done.

        Returns:
            Its results, by the names of their fields: on that card, or else numpy's.

        Raises:
            LostTensorError: As `Calls.arrays` does.
        """
        with suppress(_CardUnavailableError), cupy.cuda.Device(call.results_like.device.id) as card:
            return self._execute_on_card(call, card.id)
        return self._calls.execute(call.with_host_arrays())

    def close(self, deadline: Deadline) -> None:
        """Give all back that no array lies in, and borrow no more."""
        with self._lock:
            self._is_closed = True
            borrowers = [*self._borrowers.values()]
        for borrower in borrowers:
            # while an array lies there, the memory is open here, and the server must not free it
            borrower.give_back_unused(deadline)
            borrower.close()

    def _execute_on_card(self, call: Call, ordinal: int) -> dict[str, Array]:
        """Make a call whose tensors all lie on a card; operands that lie elsewhere are copied there.

        Raises:
            _CardUnavailableError: It is to be made in another way.
        """
        operands: dict[str, Array] = {
            field: operand
            for field, operand in call.operands.items()
            if not isinstance(operand, Resident)
        }
        tensors: list[Array | TensorSpec] = [*operands.values(), *call.results.values()]
        if len(operands) < len(call.operands) or not all(tensor.nbytes for tensor in tensors):
            raise _CardUnavailableError
        deadline = Deadline(self._timeout_s)
        asked = CallSpec(
            call.operation, call.request, call.problem, operands, call.results, deadline
        )
        borrower = self._borrower(ordinal)
        return self._calls.send(asked, borrower).arrays

    def _borrower(self, ordinal: int) -> _CardBorrower:
        with self._lock:
            if ordinal not in self._borrowers:
                borrower = _CardBorrower(self._find_socket, place=_CardMemoryKind(ordinal))
                self._borrowers[ordinal] = borrower
                if self._is_closed:
                    borrower.close()
            return self._borrowers[ordinal]


class _CardUnavailableError(Exception):
    """A call cannot be made on a card, and is to be made by way of the host."""


class _CardBorrower(Borrower):
    """A borrower whose arrays cannot be sent."""

    def check_fallback(self) -> None:
        """Have the call made by way of the host. Raises _CardUnavailableError."""
        raise _CardUnavailableError


class _CardMemoryKind:
    """Memory of a card, and cupy arrays. See `Place`."""

    min_tensor_bytes: Final = 1  # whatever is sent must first be copied to the host
    min_overlap_bytes: Final = math.inf  # the card's own copies take no time worth saving
    loss_message: Final = "cupy arrays go by way of the host"

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal
        self._id = card_id(bytes(runtime.getDeviceProperties(ordinal)["uuid"]))

    def borrow(self, link: Link, size_bytes: int) -> BorrowedRegion:
        """Return new memory. See `Place`."""
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
        """Return where an array lies. See `Place`."""
        if not isinstance(array, cupy.ndarray) or not array.flags.c_contiguous:
            return None
        address: int = array.data.ptr
        return address

    def copy_and_synchronize(self, copies: Sequence[tuple[Any, Array]]) -> None:
        """Make copies, and wait for the current stream. See `Place`."""
        for target, source in copies:
            self._copy(target, source)
        cupy.cuda.get_current_stream().synchronize()

    def _copy(self, target: Any, source: Array) -> None:
        if isinstance(source, cupy.ndarray) and source.device.id == self._ordinal:
            target[...] = source
        else:
            target.set(np.ascontiguousarray(host_array(source), target.dtype))


class _CardRegion(BorrowedRegion):
    """Memory of a card, open here until nothing lies in it any more."""

    def __init__(self, ordinal: int, name: bytes, address: int, size_bytes: int) -> None:
        super().__init__(name, address, size_bytes)
        self._ordinal = ordinal
        self._close = weakref.finalize(self, _close_memory, ordinal, address)
        self._close.atexit = False  # CUDA may have gone before

    def array(self, block: BorrowedBlock, spec: TensorSpec) -> Array:
        """Return a block as a cupy array. See `Region`."""
        memory = cupy.cuda.UnownedMemory(
            self.address + block.offset, spec.nbytes, block, self._ordinal
        )
        pointer = cupy.cuda.MemoryPointer(memory, 0)
        array: Array = cupy.ndarray(spec.shape, spec.dtype, pointer)
        return array

    def reuse_last(self, size_bytes: int) -> BorrowedBlock | None:
        """Return the block that went last anew, in the manner of `collect`: any stream may be reading it yet."""
        block = super().reuse_last(size_bytes)
        if block is not None:
            self._await_card()
        return block

    def collect(self) -> None:
        """Make room of the blocks that have gone, once the card is done with what was enqueued on them."""
        if self._dead_references:
            self._await_card()
        super().collect()

    def recover(self) -> None:
        """Make room of all blocks that have gone, in the manner of `collect`."""
        self._await_card()
        super().recover()

    def _await_card(self) -> None:
        with cupy.cuda.Device(self._ordinal) as card:
            card.synchronize()

    def unmap(self) -> None:
        """Close the memory. See `Region`."""
        self._close()


def _close_memory(ordinal: int, address: int) -> None:
    with suppress(runtime.CUDARuntimeError), cupy.cuda.Device(ordinal):  # the server may have gone
        runtime.ipcCloseMemHandle(address)
