"""Loans: what a borrower asks the server for, in a thread of its own."""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    UnavailableError,
)
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import run_in_background
from deconvd_client.shared_memory.link import (
    LendingLimitError,
    LendingUnsupportedError,
    Link,
    LinkLostError,
    NoListenerError,
)
from deconvd_client.shared_memory.memory_kind import MemoryKind
from deconvd_client.shared_memory.region import (
    BorrowedBlock,
    BorrowedRegion,
    RegionPool,
    RegionState,
)
from deconvd_client.transports.backoff import Backoff
from deconvd_client.transports.retry_policy import PinnedTransportError

__all__ = ["LenderState", "LoanClient", "LoanRequest"]

_FIRST_REGION_BYTES: Final = 64 << 20
_MAX_GROWTH_BYTES: Final = 1 << 30
"""Regions double what there is, up to this size, and have room for what they are borrowed for."""

_PAGE_BYTES: Final = mmap.PAGESIZE

_AWAY_PAUSES_S: Final = 0.5, 2.0
"""How long a server that does not answer is left in peace, at first and at most: it may be restarting here."""

_FIRST_DISOWNED_PAUSE_S: Final = 1.0
"""How long a server whose memory the server of calls does not know is left in peace at first: it may be draining."""

_NO_PAUSES_S: Final = (0.0,)
_RETRY_PAUSES_S: Final = 0.0, 0.01, 0.04, 0.15, 0.4
"""When a server is asked for memory in the place of what was given back: that counts until it is unmapped there, too,
which takes a while if a call that was given up still uses it.
"""

_PINNED_RETRY_S: Final = 0.1
"""When calls that have no other way may ask again."""

_FIND_SOCKET_TIMEOUT_S: Final = 5.0
"""How long a server may take to say where it lends."""

_log = logging.getLogger(__name__)


class LoanRequest:
    """Memory that a caller waits for.

    Attributes:
        size_bytes: How much; 0 if the caller wants to know only whether the server lends.
        block: It, once the server has lent it.
        is_first: Whether nobody has asked for memory before.
    """

    def __init__(self, size_bytes: int, *, is_first: bool) -> None:
        self.size_bytes = size_bytes
        self.is_first = is_first
        self.block: BorrowedBlock | None = None
        # A queue, since an exception in the waiting thread can leave a Condition locked.
        self._end_signal: SimpleQueue[None] = SimpleQueue()

    def wait(self, deadline: Deadline) -> bool:
        """Wait for the server's answer; return False if the deadline comes first."""
        try:
            self._end_signal.get(timeout=deadline.remaining_s())
        except Empty:
            return False
        return True

    def finish(self) -> None:
        """Wake the caller."""
        self._end_signal.put(None)


class LenderState(Enum):
    """How a borrower stands with the server that lends.

    UNTRIED --memory is wanted--> AWAY --the server lends--> LENDING
    LENDING --the socket is lost, or calls go to another server--> AWAY
    UNTRIED, AWAY or LENDING --the server lends none of this kind, and never will--> REFUSED
    any of them --`close`--> CLOSED
    """

    UNTRIED = "untried"
    """Nobody has wanted memory yet: who is first waits for the server's answer for longer than others do."""

    AWAY = "away"
    """There is no link. Some loan will open one, unless the server is left in peace for now."""

    LENDING = "lending"
    REFUSED = "refused"
    CLOSED = "closed"


_FINAL_STATES: Final = LenderState.REFUSED, LenderState.CLOSED


class LoanClient:
    """Borrows memory for a pool. Methods without a lock of their own are called under the borrower's.

    A thread talks to the server, with no lock held: a caller waits for it no longer than until its
    own deadline, and neither that nor an exception in the caller's thread leaves a request on the
    socket without its answer.

    Attributes:
        state: How the borrower stands with the server. See `LenderState`.
        link: To the server, while it is LENDING, else None.
        refusal: Why there is no memory, once that is known.

    Args:
        lock: The borrower's; never held while the server is talked to.
        pool: Gets what is borrowed.
        find_socket, is_only_way, memory_kind: As for `Borrower`.
    """

    def __init__(
        self,
        lock: threading.Lock,
        pool: RegionPool,
        find_socket: Callable[[Deadline], str],
        *,
        is_only_way: bool,
        memory_kind: MemoryKind,
    ) -> None:
        self.state: LenderState = LenderState.UNTRIED
        self.link: Link | None = None
        self.refusal: DeconvdError | None = None
        self._lock = lock
        self._pool = pool
        self._find_socket = find_socket
        self._is_only_way = is_only_way
        self._memory_kind = memory_kind
        self._reset()

    def _reset(self) -> None:
        self._backoff = Backoff()
        self._away_backoff = Backoff(*_AWAY_PAUSES_S)
        self._disowned_backoff = Backoff(_FIRST_DISOWNED_PAUSE_S)
        self._loss_level = logging.INFO  # of the next loss in the log; on another host it is none
        self._is_running = False
        self._requests: deque[LoanRequest] = deque()

    def request(self, size_bytes: int) -> LoanRequest | None:
        """Have memory borrowed, and return what to wait for; None if nothing is to be waited for."""
        if self.state in _FINAL_STATES or self._is_backing_off:
            return None
        loan = LoanRequest(size_bytes, is_first=self.state is LenderState.UNTRIED)
        if self.state is LenderState.UNTRIED:
            self._move(LenderState.AWAY)
        self._requests.append(loan)
        if not self._is_running:
            run_in_background(self._serve_requests)
        return loan

    @property
    def _is_backing_off(self) -> bool:
        """Whether the server is not to be asked yet."""
        return any(
            b.is_pending for b in (self._backoff, self._away_backoff, self._disowned_backoff)
        )

    def lose_link(self) -> None:
        """Take note that the server has closed the socket."""
        self._lose(_loss_error("the server has closed the socket"))

    def disown(self, why: str) -> None:
        """Take note that the server of calls knows nothing of what was borrowed."""
        if self.link is None:
            return
        # The lender lives, and is another one: it drains, and a successor takes calls already. Or a
        # proxy has several servers, and that will happen again.
        self._lose(_loss_error(why))
        if not self._is_only_way:
            self._disowned_backoff.note_failure()

    def close(self) -> None:
        """Give all back, for good."""
        self.refusal = CallCancelledError("the connection is closed")
        self._move(LenderState.CLOSED)

    def reset_after_fork(self) -> None:
        """Leave what was borrowed to the parent."""
        if self.link is not None:
            self.link.leave_to_parent()
        if self.state not in _FINAL_STATES:
            self._move(LenderState.UNTRIED)
        self._reset()

    def _move(self, to: LenderState, link: Link | None = None) -> None:
        """Change the state, and leave the link that it had, with all that was borrowed by it.

        The state is last: if an interrupt breaks this off, whoever looks next finds it as it was, and begins anew.
        """
        self._pool.clear()
        if self.link is not None:
            self.link.close()
        self.link, self.state = link, to

    def _lose(self, why: UnavailableError, to: LenderState = LenderState.AWAY) -> None:
        """Do without the link, until it can be opened again or for good; say so once."""
        if self.state in _FINAL_STATES:
            return
        self.refusal = why
        if self._loss_level and not self._is_only_way:
            _log.log(self._loss_level, "%s: %s", self._memory_kind.loss_message, why)
        self._loss_level = logging.NOTSET
        self._move(to)

    # What follows runs in the thread, and takes the lock itself.

    def _serve_requests(self) -> None:
        with self._lock:
            if self._is_running:
                return  # another thread was asked at the same time
            self._is_running = True
        while True:
            with self._lock:
                if not self._requests:
                    self._is_running = False
                    return
                loan = self._requests.popleft()
            try:
                self._serve_request(loan)
            finally:
                loan.finish()

    def _serve_request(self, loan: LoanRequest) -> None:
        with self._lock:
            if self.state in _FINAL_STATES or (self.link is None and self._is_backing_off):
                return  # it was asked for while an earlier one was failing
        try:
            link = self._open_link()
            self._give_back(link, lambda region: region.state is RegionState.CLOSED)
            if loan.size_bytes:
                self._fill_request(link, loan)
        except NoListenerError as error:
            with self._lock:
                self._lose(PinnedTransportError(str(error)))
        except LinkLostError as error:
            with self._lock:
                self._lose(_loss_error(str(error)))
        except LendingUnsupportedError as error:
            with self._lock:
                self._lose(PinnedTransportError(str(error)), LenderState.REFUSED)
        except DeconvdError as error:
            with self._lock:
                self._lose(UnavailableError(f"the server does not say where it lends: {error}"))
        except Exception as error:  # noqa: BLE001 - no descriptors are left, say: later loans may do better
            with self._lock:
                self._lose(_loss_error(f"memory cannot be borrowed: {error}"))

    def _open_link(self) -> Link:
        """Return the link, after opening it if need be.

        Raises:
            LinkLostError, LendingUnsupportedError: It cannot be opened.
            DeconvdError: The server does not say where.
        """
        with self._lock:
            if self.link is not None:
                return self.link
        try:
            path = self._find_socket(Deadline(_FIND_SOCKET_TIMEOUT_S))
            if not path:
                raise LendingUnsupportedError("the server lends none")
            link = Link(path)
        except BaseException as error:
            if not self._is_only_way:
                is_away = isinstance(error, (UnavailableError, DeadlineError))
                # not before it has failed: others wait for what the server answers
                with self._lock:
                    (self._away_backoff if is_away else self._backoff).note_failure()
            raise
        with self._lock:
            if self.state in _FINAL_STATES:
                link.close()
                raise LinkLostError("the connection is closed")
            self._backoff.note_success()
            self._away_backoff.note_success()
            self._move(LenderState.LENDING, link)
        return link

    def _fill_request(self, link: Link, loan: LoanRequest) -> None:
        """Fill a loan: from what other loans have brought, or else from a new region."""
        needed_bytes = -(-loan.size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        with self._lock:
            self._pool.recover()
            loan.block = self._pool.allocate(loan.size_bytes)
            step_bytes = min(max(self._pool.open_bytes, _FIRST_REGION_BYTES), _MAX_GROWTH_BYTES)
        if loan.block is not None or self._borrow_region(link, loan, max(needed_bytes, step_bytes)):
            return
        has_given_back = self._give_back(link, lambda _: True)
        for pause_s in _RETRY_PAUSES_S if has_given_back else _NO_PAUSES_S:
            time.sleep(pause_s)
            if self._borrow_region(link, loan, needed_bytes):
                return

    def _borrow_region(self, link: Link, loan: LoanRequest, region_bytes: int) -> bool:
        """Fill a loan from a new region of so many bytes; return False if the server does not lend it."""
        try:
            region = self._memory_kind.borrow(link, region_bytes)
        except LendingLimitError as error:
            _log.info("the server lends no more memory: %s", error)
            with self._lock:
                if self.link is link:
                    self.refusal = ExhaustedError(f"the server lends no more: {error}")
            return False
        with self._lock:
            if self.link is not link:
                raise LinkLostError("the server has closed the socket")
            self._loss_level = logging.WARNING
            self._pool.add(region)
            loan.block = region.allocate(loan.size_bytes)
        return True

    def _give_back(self, link: Link, is_unused: Callable[[BorrowedRegion], bool]) -> bool:
        """Give back empty regions; return whether there were any."""
        with self._lock:
            unused = self._pool.withdraw(is_unused)
        is_any = bool(unused)
        while unused:
            region = unused.pop()
            region.unmap()
            name = region.name
            del region  # and with it the mapping: it counts as lent until nobody has it
            link.give_back(name)
        return is_any


def _loss_error(why: str) -> UnavailableError:
    """Return why there is no memory now, although there may be soon."""
    return UnavailableError(why, retry_after_s=_PINNED_RETRY_S)
