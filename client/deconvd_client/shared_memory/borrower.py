"""Borrows memory from a server on this host, keeps arrays in it, and says where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from deconvd.errors import (
    DeadlineError,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    StaleRegionError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd.model.dtypes import Array, element_type
from deconvd.model.problem import TensorSpec, check_extents, spec_of
from deconvd.wire.shared_slice import SharedSlice
from deconvd_client.calls.deadline import Deadline
from deconvd_client.shared_memory.loan_thread import LenderState, LoanClient, LoanRequest
from deconvd_client.shared_memory.memory_kind import HOST_MEMORY, MemoryKind
from deconvd_client.shared_memory.region import BorrowedBlock, BorrowedRegion, RegionPool

__all__ = ["Borrower", "has_call_ended"]

_PATIENCE_S: Final = 5.0
"""How long calls that have another way wait for memory."""

_BRIEF_PATIENCE_S: Final = 0.25
"""The same, while another call asks already, or after the server was lost: one that is there answers sooner."""


class Borrower:
    """Arrays in memory that a server on this host lends. Thread-safe.

    It asks at the first need. Where the server lends nothing, or has reached a limit, its methods
    return None and the caller sends its tensors in messages. When the server goes, calls can no
    longer use what it lent, but arrays in it stay as they are; the next need asks anew. A forked child begins
    with nothing: arrays of its parent are to be read there, not written.

    What is to be done is decided here, under a lock; `Loans` talks to the server.

    Args:
        find_socket: Returns the path of the server's side socket before a deadline, empty if it has
            none. Called at the first need, and again once no one listens there or after an error of
            deconvd.errors.
        is_only_way: Whether tensors must not be sent instead.
        place: Where the memory is, and so the arrays.
    """

    def __init__(
        self,
        find_socket: Callable[[Deadline], str],
        *,
        is_only_way: bool = False,
        place: MemoryKind = HOST_MEMORY,
    ) -> None:
        self.memory_kind = place
        self._is_only_way = is_only_way
        self._lock = new_lock()  # never held while the server is talked to
        self._pool = RegionPool()
        self._loan_client = LoanClient(
            self._lock, self._pool, find_socket, is_only_way=is_only_way, place=place
        )
        register_fork_reset(self)

    def empty(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: npt.DTypeLike,
        deadline: Deadline,
    ) -> Array:
        """Return a new array with any elements: in shared memory if there is room, else outside.

        Raises:
            InvalidArgumentError: There can be no such array, or none that a call could take.
        """
        extents = (shape,) if isinstance(shape, SupportsIndex) else shape
        spec = TensorSpec(
            tuple(extent.__index__() for extent in extents), element_type("dtype", np.dtype(dtype))
        )
        check_extents("shape", spec)
        block = self.allocate(spec.nbytes, deadline) if spec.nbytes else None
        return np.empty(spec.shape, spec.dtype) if block is None else block.array(spec)

    def is_large(self, tensor: Array | TensorSpec) -> bool:
        """Return whether shared memory pays for a tensor."""
        return tensor.nbytes >= self.memory_kind.min_tensor_bytes

    def find_or_allocate(
        self, array: Array, deadline: Deadline
    ) -> tuple[SharedSlice, Array] | None:
        """Return where an array lies, and itself; or a place for a copy of it, and that, which is yet to be made.

        None if it does not lie in borrowed memory, and there is no room for it.
        """
        place = self.locate(array)
        if place is not None:
            return place, array
        spec = spec_of(array)
        block = self.allocate_unchecked(array.nbytes, deadline)
        return None if block is None else (block.shared_slice, block.array(spec))

    def locate(self, array: Array) -> SharedSlice | None:
        """Return where an array lies; None unless it lies in borrowed memory as a message's elements do."""
        address = self.memory_kind.address(array) if array.nbytes else None
        if address is None:
            return None
        for region in self._pool.regions:
            if region.contains(address, array.nbytes):
                return SharedSlice(region.name, address - region.address)
        return None

    def note_failure(self, error: BaseException, regions: Iterable[BorrowedRegion]) -> None:
        """Note how a call has failed.

        Args:
            error: Says how.
            regions: Those that the server may have been writing to. If it may be still, they have no
                room for other arrays any more.
        """
        if isinstance(error, StaleRegionError):
            self.check_link()  # a server that has gone is not another one
            with self._lock:
                self._loan_client.disown(str(error))
        elif not has_call_ended(error):
            with self._lock:
                for region in regions:
                    region.close()

    def allocate(self, size_bytes: int, deadline: Deadline) -> BorrowedBlock | None:
        """Return a new block of memory, of any size but 0; None if there is no room for it."""
        self.check_link()
        return self.allocate_unchecked(size_bytes, deadline)

    def allocate_unchecked(self, size_bytes: int, deadline: Deadline) -> BorrowedBlock | None:
        """Return a new block as `take` does. The caller has looked after the link."""
        with self._lock:
            block = self._pool.reuse_last(size_bytes)  # in a loop of like calls it always is
            if block is None:
                self._pool.collect()
                if self._pool.has_unused:
                    self._loan_client.request(0)  # gives it back
                block = self._pool.allocate(size_bytes)
            if block is not None:
                return block
            loan = self._loan_client.request(size_bytes)
        if loan is None:
            return None
        self._wait(loan, deadline)
        return loan.block

    def check_link(self) -> None:
        """Take note if the server has closed the socket since the last call."""
        with self._lock:
            link = self._loan_client.link
            if link is not None and not link.is_open:
                self._loan_client.lose_link()

    def check_fallback(self) -> None:
        """Return if what has no room here may be sent instead.

        Raises:
            UnavailableError, ExhaustedError: It may not; says why there is no room.
            DeadlineError: It may not, and the server has not answered.
            CallCancelledError: It may not, and `close` was called.
        """
        if not self._is_only_way:
            return
        why = self._loan_client.refusal
        if why is None:
            raise DeadlineError("the server did not lend memory in time")
        text = f"no tensor can go by shared memory: {why}"
        if isinstance(why, UnavailableError):
            raise type(why)(text, retry_after_s=why.retry_after_s)
        raise type(why)(text)

    def has_lender(self, deadline: Deadline) -> bool:
        """Return whether the server lends memory, as far as is known by the deadline; True if it must."""
        if self._is_only_way or self._is_lending:
            return True
        with self._lock:
            loan = self._loan_client.request(0)
        if loan is not None:
            self._wait(loan, deadline)
        return self._is_lending

    @property
    def borrowed_bytes(self) -> int:
        """What is borrowed now."""
        return sum(region.size_bytes for region in self._pool.regions)

    @property
    def allocated_bytes(self) -> int:
        """What arrays take of it now."""
        with self._lock:
            self._pool.recover()
            return sum(region.allocated_bytes for region in self._pool.regions)

    def give_back_unused(self, deadline: Deadline) -> None:
        """Give back what no array lies in; return once the server knows, or at the deadline."""
        with self._lock:
            self._pool.recover()
            for region in self._pool.regions:
                if region.is_empty:
                    region.close()
            loan = self._loan_client.request(0) if self._is_lending else None
        if loan is not None:
            loan.wait(deadline)

    def close(self) -> None:
        """Give all back, for good. Arrays that lie in it stay as they are."""
        with self._lock:
            self._loan_client.close()

    def reset_after_fork(self) -> None:
        """Leave what was borrowed to the parent."""
        self._loan_client.reset_after_fork()

    @property
    def _is_lending(self) -> bool:
        return self._loan_client.state is LenderState.LENDING

    def _wait(self, loan: LoanRequest, deadline: Deadline) -> None:
        """Wait until a loan has ended, or for as long as its caller has to."""
        if self._is_only_way:
            loan.wait(deadline)
            return
        if not loan.is_first and not self._is_lending:
            has_ended = loan.wait(deadline.with_limit(_BRIEF_PATIENCE_S))
            if has_ended or not self._is_lending:
                return
        loan.wait(deadline.with_limit(_PATIENCE_S))


def has_call_ended(error: BaseException) -> bool:
    """Return whether only a server that has done with a call can have answered so."""
    if isinstance(error, UnavailableError):
        return error.was_reached
    refusals = (InvalidArgumentError, NotFoundError, ExhaustedError, UnimplementedError)
    return isinstance(error, refusals)
