"""Borrows memory from a server on this host, keeps arrays in it, and says where they lie."""

from __future__ import annotations

import logging
import mmap
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from deconvd.dtypes import element_type
from deconvd.errors import (
    DeconvdError,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    StaleRegionError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.problem import TensorSpec, check_extents
from deconvd.shared_slice import SharedSlice
from deconvd.system import call_in_forked_children
from deconvd.tensor import Array
from deconvd_client.shared_memory.link import Link, LinkLostError, NeverLentError, NotLentError
from deconvd_client.shared_memory.places import HOST, Place
from deconvd_client.shared_memory.region import Block, Region, State

__all__ = ["Borrower"]

_FIRST_REGION_BYTES: Final = 64 << 20
_LARGEST_STEP_BYTES: Final = 1 << 30
"""Regions double what there is, up to this size, and have room for what they are borrowed for."""

_PAGE_BYTES: Final = mmap.PAGESIZE
_RETRY_S: Final = 5.0
"""How long a server without a side socket is left in peace."""

_log = logging.getLogger(__name__)


class Borrower:
    """Arrays in memory that a server on this host lends. Thread-safe.

    It connects at the first need. Where the server lends nothing, or no more, its methods return
    None and the caller sends what it has in messages. When the server goes, what it lent is of no
    more use to calls, but arrays that lie in it stay as they are; the next need connects anew. A
    forked child begins with nothing: arrays of its parent are to be read there, not written.

    Args:
        find_socket: Returns the path of the server's side socket, empty if it has none. Called at
            the first need, and again once no one listens there or after an error of deconvd.errors.
        is_only_way: Whether tensors must not be sent instead.
        place: Where the memory is, and so the arrays.
    """

    def __init__(
        self, find_socket: Callable[[], str], *, is_only_way: bool = False, place: Place = HOST
    ) -> None:
        self.place = place
        self._find_socket = find_socket
        self._is_only_way = is_only_way
        self._socket_path: str | None = None
        self._is_closed = False
        self._refusal: DeconvdError | None = None
        self._link: Link | None = None
        self._begin()
        _borrowers.add(self)

    def empty(self, shape: SupportsIndex | Sequence[SupportsIndex], dtype: npt.DTypeLike) -> Array:
        """Return a new array with any elements: in shared memory if there is room, else outside.

        Raises:
            InvalidArgumentError: There can be no such array, or none that a call could take.
        """
        extents = (shape,) if isinstance(shape, SupportsIndex) else shape
        spec = TensorSpec(
            tuple(extent.__index__() for extent in extents), element_type("dtype", np.dtype(dtype))
        )
        check_extents("shape", spec)
        block = self.take(spec.nbytes) if spec.nbytes else None
        return np.empty(spec.shape, spec.dtype) if block is None else block.array(spec)

    def is_large(self, tensor: Array | TensorSpec) -> bool:
        """Return whether shared memory pays for a tensor."""
        return tensor.nbytes >= self.place.smallest_bytes

    def locate(self, array: Array) -> SharedSlice | None:
        """Return where an array lies; None unless it lies in borrowed memory as a message's elements do."""
        address = self.place.address(array) if array.nbytes else None
        if address is None:
            return None
        for region in self._regions:
            if region.holds(address, array.nbytes):
                return SharedSlice(region.name, address - region.address)
        return None

    def note_failure(self, error: BaseException, regions: Iterable[Region]) -> None:
        """Note how a call has failed.

        Args:
            error: Says how.
            regions: Those that the server may have been writing to. If it may be still, they have no
                room for other arrays any more.
        """
        if isinstance(error, StaleRegionError):
            self._disown(str(error))
        elif not _has_ended(error):
            with self._lock:
                for region in regions:
                    region.close()

    def take(self, size_bytes: int) -> Block | None:
        """Return a new block of memory, of any size but 0; None if there is no room for it."""
        self.ask()
        return self.take_now(size_bytes)

    def take_now(self, size_bytes: int) -> Block | None:
        """Return a new block as `take` does, for who has asked meanwhile."""
        with self._lock:
            try:
                link = self._opened_link()
                if link is None:
                    return None
                again = self._again(size_bytes)
                if again is not None:  # in a loop of like calls it always is
                    return again
                self._tidy(link)
                return self._fitting(size_bytes) or self._borrowed(link, size_bytes)
            except LinkLostError as error:
                self._lose(str(error))
                return None
            except NeverLentError as error:
                self._is_closed = True
                self._lose(str(error))
                return None

    def allow_other_ways(self) -> None:
        """Return if what has no room here may be sent instead.

        Raises:
            UnavailableError, ExhaustedError: It may not; says why there is no room.
        """
        if self._is_only_way:
            why = self._refusal or UnavailableError("the connection is closed")
            raise type(why)(f"no tensor can go by shared memory: {why}")

    @property
    def is_lent(self) -> bool:
        """Whether the server lends memory, as far as is known now; True if it must."""
        if self._is_only_way or self._link is not None:
            return True
        self.ask()
        with self._lock:
            try:
                return self._opened_link() is not None
            except LinkLostError as error:
                self._lose(str(error))
                return False

    @property
    def borrowed_bytes(self) -> int:
        """What is borrowed now."""
        return sum(region.size_bytes for region in self._regions)

    @property
    def taken_bytes(self) -> int:
        """What arrays take of it now."""
        with self._lock:
            for region in self._regions:
                region.collect()
            return sum(region.taken_bytes for region in self._regions)

    def give_back_unused(self) -> None:
        """Give back what no array lies in."""
        with self._lock, suppress(LinkLostError):  # then it is given back already
            for region in self._regions:
                region.collect()
                if region.is_empty and self._link is not None:
                    self._give_back(self._link, region)

    def close(self) -> None:
        """Give all back, for good. Arrays that lie in it stay as they are."""
        with self._lock:
            self._is_closed = True
            self._forget_link()

    def begin_anew_in_child(self) -> None:
        """Leave what was borrowed to the parent. Called in a forked child, where locks may be held by no one."""
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._next_try_s = 0.0
        self._is_missed = False
        self._has_borrowed = False
        self._forget_link()

    def _forget_link(self) -> None:
        self._regions: tuple[Region, ...] = ()  # replaced whole: `locate` reads it without the lock
        if self._link is not None:
            self._link.close()
            self._link = None

    def ask(self) -> None:
        """Ask the server where it lends, if that is not known. It may be long in answering: no lock is held.

        While one thread asks, others do without, unless they must not.
        """
        with self._lock:
            self._look_after_link()
        if self._is_due and self._asking.acquire(blocking=self._is_only_way):
            try:
                if self._is_due:
                    self._socket_path = self._find_socket()
            except DeconvdError as error:
                with self._lock:
                    self._next_try_s = time.monotonic() + _RETRY_S
                    self._lose(f"the server does not say where it lends: {error}")
            finally:
                self._asking.release()

    @property
    def _is_due(self) -> bool:
        is_known = self._is_closed or self._socket_path is not None
        return not is_known and time.monotonic() >= self._next_try_s

    # What follows is called under the lock.

    def _look_after_link(self) -> None:
        if self._link is not None and not self._link.is_open:
            self._lose("the server has closed the socket")

    def _opened_link(self) -> Link | None:
        if self._link is None and self._socket_path is not None and not self._is_closed:
            self._next_try_s = time.monotonic() + _RETRY_S
            if not self._socket_path:
                self._is_closed = True
                raise LinkLostError("the server lends none")
            self._link = Link(self._socket_path)
            self._next_try_s = 0.0
        return self._link

    def _lose(self, why: str) -> None:
        """Do without the link until it can be opened again; say so once."""
        self._refusal = UnavailableError(why)
        self._socket_path = None  # a successor's may be elsewhere
        if not self._is_missed and not self._is_only_way:
            # on another host it is no loss
            level = logging.WARNING if self._has_borrowed else logging.INFO
            _log.log(level, "%s: %s", self.place.loss, why)
        self._is_missed = True
        self._forget_link()

    def _disown(self, why: str) -> None:
        """Take note that the server of calls knows nothing of what was borrowed."""
        with self._lock:
            self._look_after_link()
            if self._link is not None:  # then the lender lives, and is another one
                self._is_closed = True
                self._lose(why)

    def _tidy(self, link: Link) -> None:
        for region in self._regions:
            region.collect()
            if region.is_empty and region.state is State.CLOSED:
                self._give_back(link, region)

    def _give_back(self, link: Link, region: Region) -> None:
        self._regions = tuple(other for other in self._regions if other is not region)
        region.unmap()
        link.give_back(region.name)

    def _again(self, size_bytes: int) -> Block | None:
        """Return a block that has just gone, if it is of the right size and nothing is to be tidied."""
        for region in self._regions:
            if region.state is State.CLOSED:
                return None
        for region in self._regions:
            block = region.take_again(size_bytes)
            if block is not None:
                return block
        return None

    def _fitting(self, size_bytes: int) -> Block | None:
        for region in self._regions:
            block = region.take(size_bytes)
            if block is not None:
                return block
        return None

    def _borrowed(self, link: Link, size_bytes: int) -> Block | None:
        needed_bytes = -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        step_bytes = min(max(self.borrowed_bytes, _FIRST_REGION_BYTES), _LARGEST_STEP_BYTES)
        for region_bytes in (max(needed_bytes, step_bytes), needed_bytes):
            try:
                region = self.place.borrow(link, region_bytes)
            except NotLentError as error:
                _log.info("the server lends no more memory: %s", error)
                self._refusal = ExhaustedError(f"the server lends no more: {error}")
                for unused in self._regions:
                    if unused.is_empty:
                        self._give_back(link, unused)
                continue
            self._is_missed = False
            self._has_borrowed = True
            self._regions += (region,)
            return region.take(size_bytes)
        return None


def _has_ended(error: BaseException) -> bool:
    """Return whether only a server that has done with a call can have answered so."""
    if isinstance(error, UnavailableError):
        return error.retry_after_s is not None
    refusals = (InvalidArgumentError, NotFoundError, ExhaustedError, UnimplementedError)
    return isinstance(error, refusals)


_borrowers: weakref.WeakSet[Borrower] = weakref.WeakSet()


def _begin_anew_in_child() -> None:
    for borrower in _borrowers:
        borrower.begin_anew_in_child()


call_in_forked_children(_begin_anew_in_child)
