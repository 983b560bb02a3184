"""Kinds of memory that can be borrowed, and what a borrower does differently for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from deconvd.host.array_address import address_of
from deconvd.host.parallel_copy import copy_all
from deconvd.model.dtypes import Array
from deconvd_client.shared_memory.link import Link
from deconvd_client.shared_memory.region import BorrowedRegion

__all__ = ["HOST_MEMORY", "MemoryKind"]


class MemoryKind(Protocol):
    """A kind of memory, and the kind of arrays that it holds."""

    @property
    def min_tensor_bytes(self) -> int:
        """Size of the smallest tensor for which shared memory is faster than a message, in bytes."""

    @property
    def min_overlap_bytes(self) -> float:
        """Smallest total size of copies, in bytes, at which overlapping them with the call saves more than it costs."""

    @property
    def loss_message(self) -> str:
        """What happens without this memory, for the log."""

    def borrow(self, link: Link, size_bytes: int) -> BorrowedRegion:
        """Return new memory of at least `size_bytes`. Raises as `Link.borrow_on_card` does."""

    def address(self, array: Array) -> int | None:
        """Return the address of an array; None if it is of another kind, or not laid out as elements in a message."""

    def copy_and_synchronize(self, copies: Sequence[tuple[Array, Array]]) -> None:
        """Make copies, and return when all work on arrays of this kind is done, so that the server may use them.

        Args:
            copies: Pairs of a target of this kind and a source of any kind.
        """


class _HostMemoryKind:
    """Memory of the host, for numpy arrays. See `MemoryKind`."""

    min_tensor_bytes: Final = 32 << 10
    min_overlap_bytes: Final = 8 << 20
    loss_message: Final = "no shared memory with the server, tensors are sent instead"

    def borrow(self, link: Link, size_bytes: int) -> BorrowedRegion:
        """See `MemoryKind`."""
        return link.borrow(size_bytes)

    def address(self, array: Array) -> int | None:
        """See `MemoryKind`."""
        is_plain = array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative
        return address_of(array) if is_plain else None

    def copy_and_synchronize(self, copies: Sequence[tuple[Array, Array]]) -> None:
        """See `MemoryKind`. Numpy has no work that goes on in the background."""
        if copies:
            copy_all(copies)


HOST_MEMORY: Final[MemoryKind] = _HostMemoryKind()
