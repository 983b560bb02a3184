"""Requests of a borrower to the server, sent by a thread of their own."""

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
from deconvd.lending.protocol import FIRST_REGION_BYTES
from deconvd_client.calls.cancel_scope import abort_on_cancel
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

_MAX_GROWTH_BYTES: Final = 1 << 30
"""Each further region is as large as all others together, but no larger than this."""

_PAGE_BYTES: Final = mmap.PAGESIZE

_AWAY_PAUSES_S: Final = 0.5, 2.0
"""First and longest pause before a server that does not answer is asked again: it may be restarting."""

_FIRST_DISOWNED_PAUSE_S: Final = 1.0
"""First pause after the server of calls did not know memory of the lending server: that one may be draining."""

_NO_PAUSES_S: Final = (0.0,)

_RETRY_PAUSES_S: Final = 0.0, 0.01, 0.04, 0.15, 0.4
"""Pauses before each request for new memory after some was given back.

What was given back counts against the limit until the server has unmapped it, too. That takes a while if a call that
its client has given up still uses it.
"""

_PINNED_RETRY_S: Final = 0.1
"""How soon calls that have no other way may ask again."""

_FIND_SOCKET_TIMEOUT_S: Final = 5.0
"""How long a server may take to name its lending socket."""

_log = logging.getLogger(__name__)


class LoanRequest:
    """A request for memory, for which a caller waits.

    Attributes:
        size_bytes: How much; 0 if the caller only wants to know whether the server lends, or to give memory back.
        block: The memory, once the request is served; None if there is none.
        is_first: Whether it is the first request of the borrower.
    """

    def __init__(self, size_bytes: int, *, is_first: bool) -> None:
        self.size_bytes = size_bytes
        self.is_first = is_first
        self.block: BorrowedBlock | None = None
        # A queue: an exception from a signal handler can leave a Condition locked.
        self._end_signal: SimpleQueue[None] = SimpleQueue()

    def wait(self, deadline: Deadline) -> bool:
        """Wait until the request is served or has failed; return False if the deadline comes first.

        Raises:
            CallCancelledError: The caller's call was cancelled. The request goes on.
        """
        try:
            with abort_on_cancel(deadline.scope, self.finish):
                self._end_signal.get(timeout=deadline.remaining_s())
        except Empty:
            return False
        deadline.check_cancelled()
        return True

    def finish(self) -> None:
        """Wake the caller: the request is served, or has failed."""
        self._end_signal.put(None)


class LenderState(Enum):
    """What a borrower knows of the lending server.

    UNTRIED --the first request--> AWAY --the server lends--> LENDING
    LENDING --the link is lost, or calls go to another server--> AWAY
    UNTRIED, AWAY or LENDING --the server does not lend this kind of memory--> REFUSED
    any of them --`close`--> CLOSED
    """

    UNTRIED = "untried"
    """There was no request yet. The first caller waits for the server's answer longer than later ones do."""

    AWAY = "away"
    """There is no link. The next request opens one, unless a back-off is pending."""

    LENDING = "lending"
    """There is a link."""

    REFUSED = "refused"
    """The server does not lend this kind of memory, and is not asked again."""

    CLOSED = "closed"


_FINAL_STATES: Final = LenderState.REFUSED, LenderState.CLOSED


class LoanClient:
    """Borrows memory for a pool.

    A background thread serves the requests, one at a time, and holds no lock while it waits for the server. So a
    caller can leave at its deadline, or by an exception, and the thread still reads the reply: no reply is left on the
    socket to be taken for the next one. Public methods are called with the borrower's lock held.

    Attributes:
        state: What is known of the server. See `LenderState`.
        link: The connection to the server while it is LENDING, else None.
        refusal: Why there is no memory; None if that is not known.

    Args:
        lock: The borrower's lock.
        pool: Receives the regions.
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
        self._loss_level = (
            logging.INFO
        )  # of the next loss; until memory was lent: on another host it never is
        self._is_running = False
        self._requests: deque[LoanRequest] = deque()

    def request(self, size_bytes: int) -> LoanRequest | None:
        """Queue a request, and return it to be waited for; None if it would be in vain now."""
        if self.state in _FINAL_STATES or self._is_backing_off:
            return None
        request = LoanRequest(size_bytes, is_first=self.state is LenderState.UNTRIED)
        if self.state is LenderState.UNTRIED:
            self._move(LenderState.AWAY)
        self._requests.append(request)
        if not self._is_running:
            run_in_background(self._serve_requests)
        return request

    @property
    def _is_backing_off(self) -> bool:
        """Whether the server must not be asked yet."""
        return any(
            b.is_pending for b in (self._backoff, self._away_backoff, self._disowned_backoff)
        )

    def lose_link(self) -> None:
        """Note that the server has closed the link."""
        self._lose(_loss_error("the server has closed the socket"))

    def disown(self, why: str) -> None:
        """Note that the server of calls does not know the borrowed memory."""
        if self.link is None:
            return
        # The lending server is alive, so it is another one than the server of calls: it is draining and its
        # successor takes the calls already; or a proxy has several servers, and this will happen again.
        self._lose(_loss_error(why))
        if not self._is_only_way:
            self._disowned_backoff.note_failure()

    def close(self) -> None:
        """Give all memory back, for good."""
        self.refusal = CallCancelledError("the connection is closed")
        self._move(LenderState.CLOSED)

    def reset_after_fork(self) -> None:
        """Leave all borrowed memory to the parent process."""
        if self.link is not None:
            self.link.leave_to_parent()
        if self.state not in _FINAL_STATES:
            self._move(LenderState.UNTRIED)
        self._reset()

    def _move(self, to: LenderState, link: Link | None = None) -> None:
        """Change the state: drop the old link, and with it all that was borrowed by it.

        The state is changed last. If an interrupt ends this method early, the state is still the old one, and the
        change will be made again.
        """
        self._pool.clear()
        if self.link is not None:
            self.link.close()
        self.link, self.state = link, to

    def _lose(self, why: UnavailableError, to: LenderState = LenderState.AWAY) -> None:
        """Drop the link, until it can be opened again or for good, and log that once."""
        if self.state in _FINAL_STATES:
            return
        self.refusal = why
        if self._loss_level and not self._is_only_way:
            _log.log(self._loss_level, "%s: %s", self._memory_kind.loss_message, why)
        self._loss_level = logging.NOTSET
        self._move(to)

    # The methods below run in the background thread, and take the lock themselves.

    def _serve_requests(self) -> None:
        with self._lock:
            if self._is_running:
                return  # two callers started a thread at the same time
            self._is_running = True
        while True:
            with self._lock:
                if not self._requests:
                    self._is_running = False
                    return
                request = self._requests.popleft()
            try:
                self._serve_request(request)
            finally:
                request.finish()

    def _serve_request(self, request: LoanRequest) -> None:
        with self._lock:
            if self.state in _FINAL_STATES or (self.link is None and self._is_backing_off):
                return  # it was queued while an earlier one was failing
        try:
            link = self._open_link()
            self._give_back(link, lambda region: region.state is RegionState.CLOSED)
            if request.size_bytes:
                self._fill_request(link, request)
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
                self._lose(
                    UnavailableError(
                        f"cannot find out where the server lends shared memory: {error}"
                    )
                )
        except Exception as error:  # noqa: BLE001 - no descriptors are left, say: later requests may succeed
            with self._lock:
                self._lose(_loss_error(f"memory cannot be borrowed: {error}"))

    def _open_link(self) -> Link:
        """Return the link; open it if there is none.

        Raises:
            LinkLostError, LendingUnsupportedError: It cannot be opened.
            DeconvdError: The server did not name its lending socket.
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
                # only now that it has failed: until then other callers wait for the answer
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

    def _fill_request(self, link: Link, request: LoanRequest) -> None:
        """Serve a request from the regions that there are, or else from a new one."""
        needed_bytes = -(-request.size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        with self._lock:
            self._pool.recover()
            request.block = self._pool.allocate(request.size_bytes)
            step_bytes = min(max(self._pool.open_bytes, FIRST_REGION_BYTES), _MAX_GROWTH_BYTES)
        if request.block is not None or self._borrow_region(
            link, request, max(needed_bytes, step_bytes)
        ):
            return
        has_given_back = self._give_back(link, lambda _: True)
        for pause_s in _RETRY_PAUSES_S if has_given_back else _NO_PAUSES_S:
            time.sleep(pause_s)
            if self._borrow_region(link, request, needed_bytes):
                return

    def _borrow_region(self, link: Link, request: LoanRequest, region_bytes: int) -> bool:
        """Serve a request from a new region of `region_bytes`; return False if the server does not lend that."""
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
            request.block = region.allocate(request.size_bytes)
        return True

    def _give_back(self, link: Link, is_unused: Callable[[BorrowedRegion], bool]) -> bool:
        """Give back the empty regions for which `is_unused` holds; return whether there were any."""
        with self._lock:
            unused = self._pool.withdraw(is_unused)
        is_any = bool(unused)
        while unused:
            region = unused.pop()
            region.unmap()
            name = region.name
            del region  # and with it the mapping, before the server is told: it counts until both have unmapped it
            link.give_back(name)
        return is_any


def _loss_error(why: str) -> UnavailableError:
    """Return the error for memory that is missing now, but may be there soon."""
    return UnavailableError(why, retry_after_s=_PINNED_RETRY_S)
