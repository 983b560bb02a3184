"""Where borrowed memory may be: what a borrower does in another way for each."""

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
    """A kind of memory, and of the arrays that lie in it."""

    @property
    def min_tensor_bytes(self) -> int:
        """What is smaller is quicker sent than found there."""

    @property
    def min_overlap_bytes(self) -> float:
        """From how many bytes on, all together, copies may be made by `OverlappedCopy`: it costs less than it saves."""

    @property
    def loss_message(self) -> str:
        """What it means to do without it, for the log."""

    def borrow(self, link: Link, size_bytes: int) -> BorrowedRegion:
        """Return new memory of at least `size_bytes`. Raises as `Link.borrow_on_card` does."""

    def address(self, array: Array) -> int | None:
        """Return where an array lies; None unless it is of this kind, laid out as a message's elements."""

    def copy_and_synchronize(self, copies: Sequence[tuple[Array, Array]]) -> None:
        """Make copies, and return when what was begun on arrays is done, so that the server may use them.

        Args:
            copies: Of arrays of any kind, the second of each pair, into such of this kind.
        """


class _HostMemoryKind:
    """Memory of the host, and numpy arrays. See `Place`."""

    min_tensor_bytes: Final = 32 << 10
    min_overlap_bytes: Final = 8 << 20
    loss_message: Final = "no shared memory with the server, tensors are sent instead"

    def borrow(self, link: Link, size_bytes: int) -> BorrowedRegion:
        """Return new memory. See `Place`."""
        return link.borrow(size_bytes)

    def address(self, array: Array) -> int | None:
        """Return where an array lies. See `Place`."""
        is_plain = array.flags.c_contiguous and array.flags.aligned and array.dtype.isnative
        return address_of(array) if is_plain else None

    def copy_and_synchronize(self, copies: Sequence[tuple[Array, Array]]) -> None:
        """Make copies: all else that is done to a numpy array is done at once. See `Place`."""
        if copies:
            copy_all(copies)


HOST_MEMORY: Final[MemoryKind] = _HostMemoryKind()
