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
from deconvd_client.backoff import Backoff
from deconvd_client.deadline import Deadline
from deconvd_client.retries import PinnedTransportError
from deconvd_client.shared_memory.link import (
    Link,
    LinkLostError,
    NeverLentError,
    NotHereError,
    NotLentError,
)
from deconvd_client.shared_memory.places import Place
from deconvd_client.shared_memory.region import Block, Pool, Region, State
from deconvd_client.uninterrupted import do_beside

__all__ = ["LenderState", "Loan", "Loans"]

_FIRST_REGION_BYTES: Final = 64 << 20
_LARGEST_STEP_BYTES: Final = 1 << 30
"""Regions double what there is, up to this size, and have room for what they are borrowed for."""

_PAGE_BYTES: Final = mmap.PAGESIZE

_AWAY_PAUSES_S: Final = 0.5, 2.0
"""How long a server that does not answer is left in peace, at first and at most: it may be restarting here."""

_FIRST_DISOWNED_PAUSE_S: Final = 1.0
"""How long a server whose memory the server of calls does not know is left in peace at first: it may be draining."""

_NO_PAUSES_S: Final = (0.0,)
_SETTLING_PAUSES_S: Final = 0.0, 0.01, 0.04, 0.15, 0.4
"""When a server is asked for memory in the place of what was given back: that counts until it is unmapped there, too,
which takes a while if a call that was given up still uses it.
"""

_PINNED_RETRY_S: Final = 0.1
"""When calls that have no other way may ask again."""

_FIND_S: Final = 5.0
"""How long a server may take to say where it lends."""

_log = logging.getLogger(__name__)


class Loan:
    """Memory that a caller waits for.

    Attributes:
        size_bytes: How much; 0 if the caller wants to know only whether the server lends.
        block: It, once the server has lent it.
        is_first: Whether nobody has asked for memory before.
    """

    def __init__(self, size_bytes: int, *, is_first: bool) -> None:
        self.size_bytes = size_bytes
        self.is_first = is_first
        self.block: Block | None = None
        # A queue, since an exception in the waiting thread can leave a Condition locked.
        self._ended: SimpleQueue[None] = SimpleQueue()

    def wait(self, deadline: Deadline) -> bool:
        """Wait for the server's answer; return False if the deadline comes first."""
        try:
            self._ended.get(timeout=deadline.remaining_s())
        except Empty:
            return False
        return True

    def end(self) -> None:
        """Wake the caller."""
        self._ended.put(None)


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


_FOR_GOOD: Final = LenderState.REFUSED, LenderState.CLOSED


class Loans:
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
        find_socket, is_only_way, place: As for `Borrower`.
    """

    def __init__(
        self,
        lock: threading.Lock,
        pool: Pool,
        find_socket: Callable[[Deadline], str],
        *,
        is_only_way: bool,
        place: Place,
    ) -> None:
        self.state: LenderState = LenderState.UNTRIED
        self.link: Link | None = None
        self.refusal: DeconvdError | None = None
        self._lock = lock
        self._pool = pool
        self._find_socket = find_socket
        self._is_only_way = is_only_way
        self._place = place
        self._begin()

    def _begin(self) -> None:
        self._backoff = Backoff()
        self._away = Backoff(*_AWAY_PAUSES_S)
        self._disowned = Backoff(_FIRST_DISOWNED_PAUSE_S)
        self._loss_level = logging.INFO  # of the next loss in the log; on another host it is none
        self._is_talking = False
        self._waiting: deque[Loan] = deque()

    def request(self, size_bytes: int) -> Loan | None:
        """Have memory borrowed, and return what to wait for; None if nothing is to be waited for."""
        if self.state in _FOR_GOOD or self._is_in_peace:
            return None
        loan = Loan(size_bytes, is_first=self.state is LenderState.UNTRIED)
        if self.state is LenderState.UNTRIED:
            self._move(LenderState.AWAY)
        self._waiting.append(loan)
        if not self._is_talking:
            do_beside(self._talk)
        return loan

    @property
    def _is_in_peace(self) -> bool:
        """Whether the server is not to be asked yet."""
        return any(b.is_pending for b in (self._backoff, self._away, self._disowned))

    def lose_link(self) -> None:
        """Take note that the server has closed the socket."""
        self._lose(_lost("the server has closed the socket"))

    def disown(self, why: str) -> None:
        """Take note that the server of calls knows nothing of what was borrowed."""
        if self.link is None:
            return
        # The lender lives, and is another one: it drains, and a successor takes calls already. Or a
        # proxy has several servers, and that will happen again.
        self._lose(_lost(why))
        if not self._is_only_way:
            self._disowned.note_failure()

    def close(self) -> None:
        """Give all back, for good."""
        self.refusal = CallCancelledError("the connection is closed")
        self._move(LenderState.CLOSED)

    def begin_anew_in_child(self) -> None:
        """Leave what was borrowed to the parent."""
        if self.link is not None:
            self.link.leave_to_parent()
        if self.state not in _FOR_GOOD:
            self._move(LenderState.UNTRIED)
        self._begin()

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
        if self.state in _FOR_GOOD:
            return
        self.refusal = why
        if self._loss_level and not self._is_only_way:
            _log.log(self._loss_level, "%s: %s", self._place.loss, why)
        self._loss_level = logging.NOTSET
        self._move(to)

    # What follows runs in the thread, and takes the lock itself.

    def _talk(self) -> None:
        with self._lock:
            if self._is_talking:
                return  # another thread was asked at the same time
            self._is_talking = True
        while True:
            with self._lock:
                if not self._waiting:
                    self._is_talking = False
                    return
                loan = self._waiting.popleft()
            try:
                self._lend(loan)
            finally:
                loan.end()

    def _lend(self, loan: Loan) -> None:
        with self._lock:
            if self.state in _FOR_GOOD or (self.link is None and self._is_in_peace):
                return  # it was asked for while an earlier one was failing
        try:
            link = self._open_link()
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
                self._lose(PinnedTransportError(str(error)), LenderState.REFUSED)
        except DeconvdError as error:
            with self._lock:
                self._lose(UnavailableError(f"the server does not say where it lends: {error}"))
        except Exception as error:  # noqa: BLE001 - no descriptors are left, say: later loans may do better
            with self._lock:
                self._lose(_lost(f"memory cannot be borrowed: {error}"))

    def _open_link(self) -> Link:
        """Return the link, after opening it if need be.

        Raises:
            LinkLostError, NeverLentError: It cannot be opened.
            DeconvdError: The server does not say where.
        """
        with self._lock:
            if self.link is not None:
                return self.link
        try:
            path = self._find_socket(Deadline(_FIND_S))
            if not path:
                raise NeverLentError("the server lends none")
            link = Link(path)
        except BaseException as error:
            if not self._is_only_way:
                is_away = isinstance(error, (UnavailableError, DeadlineError))
                # not before it has failed: others wait for what the server answers
                with self._lock:
                    (self._away if is_away else self._backoff).note_failure()
            raise
        with self._lock:
            if self.state in _FOR_GOOD:
                link.close()
                raise LinkLostError("the connection is closed")
            self._backoff.note_success()
            self._away.note_success()
            self._move(LenderState.LENDING, link)
        return link

    def _borrow(self, link: Link, loan: Loan) -> None:
        """Fill a loan: from what other loans have brought, or else from a new region."""
        needed_bytes = -(-loan.size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        with self._lock:
            self._pool.recover()
            loan.block = self._pool.take(loan.size_bytes)
            step_bytes = min(max(self._pool.open_bytes, _FIRST_REGION_BYTES), _LARGEST_STEP_BYTES)
        if loan.block is not None or self._is_lent(link, loan, max(needed_bytes, step_bytes)):
            return
        has_given_back = self._give_back(link, lambda _: True)
        for pause_s in _SETTLING_PAUSES_S if has_given_back else _NO_PAUSES_S:
            time.sleep(pause_s)
            if self._is_lent(link, loan, needed_bytes):
                return

    def _is_lent(self, link: Link, loan: Loan, region_bytes: int) -> bool:
        """Fill a loan from a new region of so many bytes; return False if the server does not lend it."""
        try:
            region = self._place.borrow(link, region_bytes)
        except NotLentError as error:
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
            loan.block = region.take(loan.size_bytes)
        return True

    def _give_back(self, link: Link, is_unused: Callable[[Region], bool]) -> bool:
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


def _lost(why: str) -> UnavailableError:
    """Return why there is no memory now, although there may be soon."""
    return UnavailableError(why, retry_after_s=_PINNED_RETRY_S)
