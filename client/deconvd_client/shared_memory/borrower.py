"""The borrower: gets memory from a server on this host, puts arrays there, and says where they are."""

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
from deconvd.model.problem import TensorSpec, check_extents
from deconvd.wire.shared_slice import SharedSlice
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.patience import Patience
from deconvd_client.shared_memory.loan_thread import LenderState, LoanClient, LoanRequest
from deconvd_client.shared_memory.memory_kind import HOST_MEMORY, MemoryKind
from deconvd_client.shared_memory.region import BorrowedBlock, BorrowedRegion, RegionPool

__all__ = ["Borrower", "has_call_ended"]

_PATIENCE_S: Final = 5.0
"""How long a call that has another way waits for memory."""

_BRIEF_PATIENCE_S: Final = 0.25
"""The same, if another call is asking already or the server was lost: a server that is there answers sooner."""


class Borrower:
    """Arrays in memory that a server on this host lends. Thread-safe.

    The server is asked for memory when some is first needed. Where it lends none, or has reached a limit, methods
    return None and the caller sends its tensors in messages. When the server goes, calls can no longer use what it
    lent, but the arrays there keep their values; when memory is next needed, the server is asked again. A forked child
    begins with nothing: it may read the arrays of its parent, but must not write to them.

    Decisions are made here, under a lock; `LoanClient` talks to the server.

    Args:
        find_socket: Returns the path of the server's lending socket before a deadline; empty if there is none. Called
            when memory is first needed, and again once nobody listens there or it raised a DeconvdError.
        is_only_way: Whether tensors must not be sent instead.
        memory_kind: The kind of memory, and so of the arrays.
        patience: Bounds how long calls wait to learn whether the server lends memory.
    """

    def __init__(
        self,
        find_socket: Callable[[Deadline], str],
        *,
        is_only_way: bool = False,
        memory_kind: MemoryKind = HOST_MEMORY,
        patience: Patience | None = None,
    ) -> None:
        self.memory_kind = memory_kind
        self._patience = Patience() if patience is None else patience
        self._is_only_way = is_only_way
        self._lock = new_lock()  # never held while this talks to the server
        self._pool = RegionPool()
        self._loan_client = LoanClient(
            self._lock, self._pool, find_socket, is_only_way=is_only_way, memory_kind=memory_kind
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
            InvalidArgumentError: There can be no such array, or no call could take it.
        """
        extents = (shape,) if isinstance(shape, SupportsIndex) else shape
        spec = TensorSpec(
            tuple(extent.__index__() for extent in extents), element_type("dtype", np.dtype(dtype))
        )
        check_extents("shape", spec)
        block = self.allocate(spec.nbytes, deadline) if spec.nbytes else None
        if block is None:
            return np.empty(spec.shape, spec.dtype)
        return block.region.array(block, spec)

    def is_large(self, tensor: Array | TensorSpec) -> bool:
        """Return whether a tensor is large enough for shared memory to pay."""
        return tensor.nbytes >= self.memory_kind.min_tensor_bytes

    def locate(self, array: Array) -> SharedSlice | None:
        """Return where in borrowed memory an array is.

        None if it is elsewhere, or not laid out as a message's elements are.
        """
        size_bytes = array.nbytes
        address = self.memory_kind.address(array) if size_bytes else None
        if address is None:
            return None
        for region in self._pool.regions:
            if region.contains(address, size_bytes):
                return SharedSlice(region.name, address - region.address)
        return None

    def note_failure(self, error: BaseException, regions: Iterable[BorrowedRegion]) -> None:
        """Note that a call has failed.

        Args:
            error: What it raised.
            regions: Where its results were to be. If the server may still write them, these regions are closed.
        """
        if isinstance(error, StaleRegionError):
            # first, to tell a lender that has gone from one that is not the server of calls
            self.check_link()
            with self._lock:
                self._loan_client.disown(str(error))
        elif not has_call_ended(error):
            with self._lock:
                for region in regions:
                    region.close()

    def allocate(self, size_bytes: int, deadline: Deadline) -> BorrowedBlock | None:
        """Return a new block of memory; None if there is no room for it. The size must be positive.

        This waits until it is known whether the server lends memory, however long that takes calls.
        """
        self.check_link()
        return self._allocate(size_bytes, deadline, Patience())

    def allocate_unchecked(
        self, size_bytes: int, deadline: Deadline, field: str = ""
    ) -> BorrowedBlock | None:
        """Return a new block for a call, as far as that has patience. The caller must have called `check_link`.

        Args:
            field: The field of the call's operand or result that the block is for.
        """
        return self._allocate(size_bytes, deadline, self._patience, field)

    def _allocate(
        self, size_bytes: int, deadline: Deadline, patience: Patience, field: str = ""
    ) -> BorrowedBlock | None:
        with self._lock:
            block = self._pool.reuse(size_bytes, field)  # always found in a loop of like calls
            if block is None:
                self._pool.collect()
                if self._pool.has_unused:
                    self._loan_client.request(0)  # its thread gives the region back
                block = self._pool.allocate(size_bytes)
            if block is not None:
                block.reference.field = field
                return block
            request = self._loan_client.request(size_bytes)
        if request is None:
            return None
        self._wait(request, deadline, patience)
        if request.block is not None:
            request.block.reference.field = field
        return request.block

    def check_link(self) -> None:
        """Notice if the server has closed the socket since the last call."""
        with self._lock:
            link = self._loan_client.link
            if link is not None and not link.is_open:
                self._loan_client.lose_link()

    def check_fallback(self) -> None:
        """Return if tensors that have no room in shared memory may be sent instead.

        Raises:
            UnavailableError, ExhaustedError: They may not; the message says why there is no room.
            DeadlineError: They may not, and the server has not answered.
            CallCancelledError: They may not, and `close` was called.
        """
        if not self._is_only_way:
            return
        why = self._loan_client.refusal
        if why is None:
            raise DeadlineError("the server did not lend memory in time")
        text = f"transport='shared_memory' cannot be used: {why}"
        if isinstance(why, UnavailableError):
            raise type(why)(text, retry_after_s=why.retry_after_s)
        raise type(why)(text)

    def has_lender(self, deadline: Deadline) -> bool:
        """Return whether the server lends memory, as far as is known by the deadline; True if there is no other way."""
        if self._is_only_way or self.is_lending:
            return True
        with self._lock:
            request = self._loan_client.request(0)
        if request is not None:
            self._wait(request, deadline, self._patience)
        return self.is_lending

    @property
    def borrowed_bytes(self) -> int:
        """Size of all borrowed memory."""
        return sum(region.size_bytes for region in self._pool.regions)

    @property
    def allocated_bytes(self) -> int:
        """Size of the borrowed memory that arrays use."""
        with self._lock:
            self._pool.recover()
            return sum(region.allocated_bytes for region in self._pool.regions)

    def give_back_unused(self, deadline: Deadline) -> None:
        """Give back the regions without arrays; return once the server knows, or at the deadline."""
        with self._lock:
            self._pool.recover()
            for region in self._pool.regions:
                if region.is_empty:
                    region.close()
            request = self._loan_client.request(0) if self.is_lending else None
        if request is not None:
            request.wait(deadline)

    def close(self) -> None:
        """Give all memory back, for good. Arrays there keep their values."""
        with self._lock:
            self._loan_client.close()

    def reset_after_fork(self) -> None:
        """Leave all borrowed memory to the parent process."""
        self._loan_client.reset_after_fork()

    @property
    def is_lending(self) -> bool:
        """Whether the server is known to lend memory. It is not asked."""
        return self._loan_client.state is LenderState.LENDING

    def _wait(self, request: LoanRequest, deadline: Deadline, patience: Patience) -> None:
        """Wait until a request has ended, but no longer than its caller should."""
        if self._is_only_way:
            request.wait(deadline)
            return
        if not self.is_lending:
            limit_s = _PATIENCE_S if request.is_first else _BRIEF_PATIENCE_S
            limit_s = min(limit_s, patience.remaining_s())
            if request.wait(deadline.with_limit(limit_s)) or not self.is_lending:
                return
        request.wait(deadline.with_limit(_PATIENCE_S))


def has_call_ended(error: BaseException) -> bool:
    """Return whether an error proves that the server has finished with the call."""
    if isinstance(error, UnavailableError):
        return error.was_reached
    refusals = (InvalidArgumentError, NotFoundError, ExhaustedError, UnimplementedError)
    return isinstance(error, refusals)
