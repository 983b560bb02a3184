"""Borrows memory from a server on this host, keeps arrays in it, and says where they lie."""

from __future__ import annotations

import logging
import mmap
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Final, SupportsIndex

import numpy as np
import numpy.typing as npt

from deconvd.dtypes import element_type
from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    InvalidArgumentError,
    NotFoundError,
    StaleRegionError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.forks import begin_anew_in_children, new_lock
from deconvd.problem import TensorSpec, check_extents
from deconvd.shared_slice import SharedSlice
from deconvd.tensor import Array
from deconvd_client.deadline import Deadline
from deconvd_client.retries import PinnedTransportError
from deconvd_client.shared_memory.link import (
    Link,
    LinkLostError,
    NeverLentError,
    NotHereError,
    NotLentError,
)
from deconvd_client.shared_memory.places import HOST, Place
from deconvd_client.shared_memory.region import Block, Region, State
from deconvd_client.uninterrupted import do_beside

__all__ = ["Borrower", "has_ended"]

_FIRST_REGION_BYTES: Final = 64 << 20
_LARGEST_STEP_BYTES: Final = 1 << 30
"""Regions double what there is, up to this size, and have room for what they are borrowed for."""

_PAGE_BYTES: Final = mmap.PAGESIZE

_FIRST_RETRY_S: Final = 5.0
_LAST_RETRY_S: Final = 80.0
"""How long a server without a side socket is left in peace: at first, and at most."""

_FIRST_DISOWNED_RETRY_S: Final = 1.0
"""How long a server whose memory the server of calls does not know is left in peace at first: it may be draining."""

_PINNED_RETRY_S: Final = 0.1
"""When calls that have no other way may ask again."""

_FIND_S: Final = 5.0
"""How long a server may take to say where it lends."""

_PATIENCE_S: Final = 5.0
"""How long calls that have another way wait for memory."""

_BRIEF_PATIENCE_S: Final = 0.25
"""The same, while another call asks already, or after the server was lost: one that is there answers sooner."""

_log = logging.getLogger(__name__)


class _Loan:
    """Memory that a caller waits for.

    Attributes:
        size_bytes: How much; 0 if the caller wants to know only whether the server lends.
        block: It, once the server has lent it.
        is_first: Whether nobody has wished for memory before.
    """

    def __init__(self, size_bytes: int, *, is_first: bool) -> None:
        self.size_bytes = size_bytes
        self.is_first = is_first
        self.block: Block | None = None
        # A queue, since an exception in the waiting thread can leave a Condition locked.
        self._ended: SimpleQueue[None] = SimpleQueue()

    def has_ended(self, deadline: Deadline) -> bool:
        """Return whether the server has answered by the deadline, which ends the waiting."""
        try:
            self._ended.get(timeout=deadline.remaining_s())
        except Empty:
            return False
        return True

    def end(self) -> None:
        """Wake the caller."""
        self._ended.put(None)


class _State(Enum):
    """How a borrower stands with the server that lends.

    UNKNOWN --a loan is wanted, and the server says where it lends--> LENDING
    LENDING --the socket is lost--> UNKNOWN
    LENDING --calls go to another server--> UNKNOWN
    UNKNOWN or LENDING --the server lends none of this kind, or `close`--> CLOSED
    """

    UNKNOWN = "unknown"
    LENDING = "lending"
    CLOSED = "closed"


class Borrower:
    """Arrays in memory that a server on this host lends. Thread-safe.

    It asks at the first need. Where the server lends nothing, or no more, its methods return None
    and the caller sends what it has in messages. When the server goes, what it lent is of no more
    use to calls, but arrays in it stay as they are; the next need asks anew. A forked child begins
    with nothing: arrays of its parent are to be read there, not written.

    What is to be done is decided under a lock. A thread of the borrower's own talks to the server,
    with no lock held: a caller waits for it no longer than until its own deadline, and neither that
    nor an exception in the caller's thread leaves a request on the socket without its answer.

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
        place: Place = HOST,
    ) -> None:
        self.place = place
        self._find_socket = find_socket
        self._is_only_way = is_only_way
        self._state = _State.UNKNOWN
        self._refusal: DeconvdError | None = None
        self._link: Link | None = None
        self._lock = new_lock()  # never held while the server is talked to
        self._begin()
        begin_anew_in_children(self)

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
        block = self.take(spec.nbytes, deadline) if spec.nbytes else None
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
        elif not has_ended(error):
            with self._lock:
                for region in regions:
                    region.close()

    def take(self, size_bytes: int, deadline: Deadline) -> Block | None:
        """Return a new block of memory, of any size but 0; None if there is no room for it."""
        self.look_after_link()
        return self.take_now(size_bytes, deadline)

    def take_now(self, size_bytes: int, deadline: Deadline) -> Block | None:
        """Return a new block as `take` does, for who has looked after the link meanwhile."""
        with self._lock:
            block = self._again(size_bytes)  # in a loop of like calls it always is
            if block is None:
                self._collect()
                block = self._fitting(size_bytes)
            if block is not None:
                return block
            loan = self._wish(size_bytes)
        if loan is None:
            return None
        self._wait(loan, deadline)
        return loan.block

    def look_after_link(self) -> None:
        """Take note if the server has closed the socket since the last call."""
        with self._lock:
            self._look_after_link()

    def allow_other_ways(self) -> None:
        """Return if what has no room here may be sent instead.

        Raises:
            UnavailableError, ExhaustedError: It may not; says why there is no room.
            DeadlineError: It may not, and the server has not answered.
            CallCancelledError: It may not, and `close` was called.
        """
        if not self._is_only_way:
            return
        why = self._refusal
        if why is None:
            raise DeadlineError("the server did not lend memory in time")
        text = f"no tensor can go by shared memory: {why}"
        if isinstance(why, UnavailableError):
            raise type(why)(text, retry_after_s=why.retry_after_s)
        raise type(why)(text)

    def lends(self, deadline: Deadline) -> bool:
        """Return whether the server lends memory, as far as is known by the deadline; True if it must."""
        if self._is_only_way or self._link is not None:
            return True
        with self._lock:
            loan = self._wish(0)
        if loan is not None:
            self._wait(loan, deadline)
        return self._link is not None

    @property
    def borrowed_bytes(self) -> int:
        """What is borrowed now."""
        return sum(region.size_bytes for region in self._regions)

    @property
    def taken_bytes(self) -> int:
        """What arrays take of it now."""
        with self._lock:
            for region in self._regions:
                region.recover()
            return sum(region.taken_bytes for region in self._regions)

    def give_back_unused(self, deadline: Deadline) -> None:
        """Give back what no array lies in; return once the server knows, or at the deadline."""
        with self._lock:
            for region in self._regions:
                region.recover()
                if region.is_empty:
                    region.close()
            loan = self._wish(0) if self._link is not None else None
        if loan is not None:
            loan.has_ended(deadline)

    def close(self) -> None:
        """Give all back, for good. Arrays that lie in it stay as they are."""
        with self._lock:
            self._state = _State.CLOSED
            self._refusal = CallCancelledError("the connection is closed")
            self._forget_link()

    def begin_anew_in_child(self) -> None:
        """Leave what was borrowed to the parent."""
        if self._link is not None:
            self._link.leave_to_parent()
            self._link = None
        self._begin()

    def _begin(self) -> None:
        self._regions: tuple[Region, ...] = ()  # replaced whole: `locate` reads it without the lock
        self._next_try_s, self._retry_s = 0.0, _FIRST_RETRY_S
        self._disowned_retry_s = _FIRST_DISOWNED_RETRY_S
        self._was_tried = False
        self._is_missed = False
        self._has_borrowed = False
        self._is_talking = False
        self._loans: deque[_Loan] = deque()
        if self._state is _State.LENDING:
            self._state = _State.UNKNOWN

    def _wait(self, loan: _Loan, deadline: Deadline) -> None:
        """Wait until a loan has ended, or for as long as its caller has to."""
        if self._is_only_way:
            loan.has_ended(deadline)
            return
        is_brief = self._link is None and not loan.is_first
        if is_brief and (loan.has_ended(deadline.within(_BRIEF_PATIENCE_S)) or self._link is None):
            return
        loan.has_ended(deadline.within(_PATIENCE_S))

    # What follows decides, and is called under the lock.

    def _wish(self, size_bytes: int) -> _Loan | None:
        """Have memory borrowed, and return what to wait for; None if nothing is to be waited for."""
        if self._state is _State.CLOSED or time.monotonic() < self._next_try_s:
            return None
        loan = _Loan(size_bytes, is_first=not self._was_tried)
        self._was_tried = True
        self._loans.append(loan)
        if not self._is_talking:
            do_beside(self._talk)
        return loan

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

    def _collect(self) -> None:
        """Make room of blocks that have gone, and have regions given back that are of no more use."""
        for region in self._regions:
            region.collect()
        if any(region.is_empty and region.state is State.CLOSED for region in self._regions):
            self._wish(0)

    def _fitting(self, size_bytes: int) -> Block | None:
        for region in self._regions:
            block = region.take(size_bytes)
            if block is not None:
                return block
        return None

    def _withdraw(self, is_unused: Callable[[Region], bool]) -> list[Region]:
        """Return regions to give back, which are not the borrower's any more."""
        for region in self._regions:
            region.recover()
        unused = [region for region in self._regions if region.is_empty and is_unused(region)]
        self._regions = tuple(region for region in self._regions if region not in unused)
        return unused

    def _look_after_link(self) -> None:
        if self._link is not None and not self._link.is_open:
            self._lose(_lost("the server has closed the socket"))

    def _lose(self, why: UnavailableError, state: _State = _State.UNKNOWN) -> None:
        """Do without the link, until it can be opened again or for good; say so once."""
        if self._state is _State.CLOSED:
            return
        self._state = state
        self._refusal = why
        if not self._is_missed and not self._is_only_way:
            # on another host it is no loss
            level = logging.WARNING if self._has_borrowed else logging.INFO
            _log.log(level, "%s: %s", self.place.loss, why)
        self._is_missed = True
        self._forget_link()

    def _forget_link(self) -> None:
        self._regions = ()
        if self._link is not None:
            self._link.close()
            self._link = None

    def _disown(self, why: str) -> None:
        """Take note that the server of calls knows nothing of what was borrowed."""
        with self._lock:
            self._look_after_link()
            if self._link is None:
                return
            # The lender lives, and is another one: it drains, and a successor takes calls already. Or a
            # proxy has several servers, and that will happen again.
            self._lose(_lost(why))
            if not self._is_only_way:
                self._next_try_s = time.monotonic() + self._disowned_retry_s
                self._disowned_retry_s = min(2 * self._disowned_retry_s, _LAST_RETRY_S)

    # What follows talks, in a thread of its own, without the lock.

    def _talk(self) -> None:
        with self._lock:
            if self._is_talking:
                return  # another thread was asked at the same time
            self._is_talking = True
        while True:
            with self._lock:
                if not self._loans:
                    self._is_talking = False
                    return
                loan = self._loans.popleft()
            try:
                self._lend(loan)
            finally:
                loan.end()

    def _lend(self, loan: _Loan) -> None:
        with self._lock:
            if self._link is None and time.monotonic() < self._next_try_s:
                return  # it was wished for while an earlier one was failing
        try:
            link = self._opened_link()
            self._give_back(link, lambda region: region.state is State.CLOSED)
            if loan.size_bytes:
                self._borrow(link, loan)
        except NotHereError as error:
            with self._lock:
                self._lose(PinnedTransportError(str(error)))
        except LinkLostError as error:
            with self._lock:
                self._lose(_lost(str(error)))
        except NeverLentError as error:
            with self._lock:
                self._lose(PinnedTransportError(str(error)), _State.CLOSED)
        except DeconvdError as error:
            with self._lock:
                self._lose(UnavailableError(f"the server does not say where it lends: {error}"))
        except Exception as error:  # no descriptors are left, say: later loans may do better
            with self._lock:
                self._lose(_lost(f"memory cannot be borrowed: {error}"))

    def _opened_link(self) -> Link:
        """Return the link, after opening it if need be.

        Raises:
            LinkLostError, NeverLentError: It cannot be opened.
            DeconvdError: The server does not say where.
        """
        with self._lock:
            if self._link is not None:
                return self._link
        try:
            path = self._find_socket(Deadline(_FIND_S))
            if not path:
                raise NeverLentError("the server lends none")
            link = Link(path)
        except BaseException:
            self._leave_in_peace()
            raise
        with self._lock:
            if self._state is _State.CLOSED:
                link.close()
                raise LinkLostError("the connection is closed")
            self._next_try_s, self._retry_s = 0.0, _FIRST_RETRY_S
            self._state = _State.LENDING
            self._link = link
        return link

    def _leave_in_peace(self) -> None:
        """Let loans wait until the server is asked again. Not before it has failed: others wait for what it answers."""
        with self._lock:
            if not self._is_only_way:
                self._next_try_s = time.monotonic() + self._retry_s
                self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)

    def _borrow(self, link: Link, loan: _Loan) -> None:
        """Fill a loan: from what other loans have brought, or else from a new region."""
        needed_bytes = -(-loan.size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        with self._lock:
            for region in self._regions:
                region.recover()
            loan.block = self._fitting(loan.size_bytes)
            # regions that broken calls have closed do not count: they go back soon
            open_bytes = sum(r.size_bytes for r in self._regions if r.state is State.OPEN)
            step_bytes = min(max(open_bytes, _FIRST_REGION_BYTES), _LARGEST_STEP_BYTES)
        for region_bytes in (max(needed_bytes, step_bytes), needed_bytes):
            if loan.block is not None:
                return
            try:
                region = self.place.borrow(link, region_bytes)
            except NotLentError as error:
                _log.info("the server lends no more memory: %s", error)
                self._refusal = ExhaustedError(f"the server lends no more: {error}")
                self._give_back(link, lambda _: True)
                continue
            with self._lock:
                if self._link is not link:
                    raise LinkLostError("the server has closed the socket")
                self._is_missed = False
                self._has_borrowed = True
                self._regions += (region,)
                loan.block = region.take(loan.size_bytes)

    def _give_back(self, link: Link, is_unused: Callable[[Region], bool]) -> None:
        with self._lock:
            unused = self._withdraw(is_unused)
        for region in unused:
            region.unmap()
            link.give_back(region.name)


def _lost(why: str) -> UnavailableError:
    """Return why there is no memory now, although there may be soon."""
    return UnavailableError(why, retry_after_s=_PINNED_RETRY_S)


def has_ended(error: BaseException) -> bool:
    """Return whether only a server that has done with a call can have answered so."""
    if isinstance(error, UnavailableError):
        return error.retry_after_s is not None
    refusals = (InvalidArgumentError, NotFoundError, ExhaustedError, UnimplementedError)
    return isinstance(error, refusals)
