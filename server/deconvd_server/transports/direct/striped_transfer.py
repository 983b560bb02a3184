"""The elements of one striped call: which pieces have arrived, and which may leave. See `deconvd.direct.protocol`.

    EXPECTED --the call comes--> OPEN --the call ends--> ENDED
        |                          |                       ^
        |                          `--it is cancelled--> BROKEN
        `--the call never comes----------------------------'

Threads meet here: one serves the call, and one serves each stripe. They wait for each other with the lock of this
object, and hold it for neither I/O nor the copying of elements.

    the call's thread       receive_into, then wait_for as operands arrive; send_from, note_written, finish, end
    a stripe's thread       wait_until_open, then for each run: begin_landing and note_landed; end_landing, then
                            take_result until it returns None

When has such a call succeeded? As any direct call: once all of its answer has been written to its connections, here the
ANSWER and the END of each stripe. A client that goes after that has everything, even if the threads that have written
do not know yet that they have. So what a client's end means is decided where its connection was written:

    a member    WAITING <--> TRANSFERRING
                   `--its END is about to be written--> ENDING --it is written--> ENDED
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from deconvd.direct.connection_errors import ConnectionBrokenError, ConnectionClosedError
from deconvd.direct.pieces import PieceSpace, run_length
from deconvd.errors import DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.model.dtypes import Array
from deconvd_server.call.context import CallContext, ClientWait
from deconvd_server.transports.direct.landing import LandingPieces, WrongRunError

__all__ = ["STRIPE_WAIT_S", "StripeMember", "StripeState", "StripedTransfer", "TransferState"]

STRIPE_WAIT_S: Final = 10.0
"""How long a stripe and its call wait for each other. Clients send both at once."""

_RETRY_AFTER_S: Final = 0.1
"""When the client of a call whose connection has ended may try again: soon, as it did not wait for the server."""


class TransferState(Enum):
    """Where a transfer is in its life."""

    EXPECTED = "expected"
    OPEN = "open"
    BROKEN = "broken"
    ENDED = "ended"


class StripeState(Enum):
    """What a stripe does."""

    WAITING = "waiting"
    """For the server."""

    TRANSFERRING = "transferring"
    """It sends or receives."""

    ENDING = "ending"
    """It sends its END. Whether the client gets it is known to the stripe's thread alone."""

    ENDED = "ended"
    """The END is written: the client has all that the stripe had for it."""


@dataclass(slots=True, eq=False)
class StripeMember:
    """A connection's membership in a transfer.

    Attributes:
        wait: Tells since when the connection has waited for its client.
        shutdown: Breaks the connection, from any thread and without waiting.
        state: What the stripe does. Its thread sets it.
    """

    wait: ClientWait
    shutdown: Callable[[], None]
    state: StripeState = StripeState.WAITING


class StripedTransfer:
    """The elements of one striped call. It is the call's `StripedElements`, `ArrivalProgress` and `ClientWait`.

    Attributes:
        peer_key: The peer whose connections may join.
        state: Its state. It changes only under the lock of this object.
    """

    def __init__(self, peer_key: str) -> None:
        self.peer_key = peer_key
        self.state = TransferState.EXPECTED
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # for stripes, and for the end
        self._arrived = threading.Condition(self._lock)  # for the thread that computes
        self._call: CallContext | None = None
        self._members: dict[StripeMember, None] = {}
        self._lacking_count = 0  # stripes of the call that have not joined
        self._landing_count = 0  # stripes of the call that have more to receive, as far as is known
        self._opened_s = self._progressed_s = math.inf
        self._operands: LandingPieces | None = None
        self._awaited_bytes = 0  # what the thread that computes waits for
        self._results: PieceSpace | None = None
        self._result_sizes: list[int] = []
        self._written_sizes: list[int] = []
        self._written_bytes = 0  # of the results, from their begin without a gap
        self._is_computed = False
        self._taken_count = 0  # pieces of results that stripes have taken to send
        self._run_length = 1  # how many of them are taken at once, if so many are written
        self._stripes_count = 1
        self._ended_count = 0  # stripes of the call whose END is written

    # For the registry

    def open(self, call: CallContext, stripes_count: int) -> bool:
        """Begin with the call, which has come. Return False if that has happened before.

        Of the stripes that have come before, those beyond the number of the call's are refused.
        """
        with self._changed:
            if self.state is not TransferState.EXPECTED:
                return False
            self.state = TransferState.OPEN
            self._call = call
            for member in [*self._members][stripes_count:]:
                del self._members[member]
            self._lacking_count = stripes_count - len(self._members)
            self._landing_count = stripes_count
            self._stripes_count = stripes_count
            self._opened_s = time.monotonic()
            self._changed.notify_all()
        call.on_cancel(self._break)
        return True

    def add(self, member: StripeMember) -> bool:
        """Add a stripe; return whether there is a place for it."""
        with self._lock:
            if self.state is TransferState.OPEN and self._lacking_count:
                self._lacking_count -= 1
                self._progressed_s = time.monotonic()
            elif self.state is not TransferState.EXPECTED:
                return False
            self._members[member] = None
            return True

    def remove(self, member: StripeMember) -> bool:
        """Remove a stripe, which uses no memory of the call any more.

        Return whether nothing is left of the transfer: no call has come, and no other stripe.
        """
        with self._changed:
            if self._members.pop(member, member) is None:
                self._progressed_s = time.monotonic()
                self._ended_count += member.state is StripeState.ENDED
                if not self._members:  # `finish` and `end` wait for that, and for none alone
                    self._changed.notify_all()
            return self.state is TransferState.EXPECTED and not self._members

    def expire(self) -> None:
        """End the transfer if its call has not come: nothing waits for it any longer."""
        with self._changed:
            if self.state is TransferState.EXPECTED:
                self.state = TransferState.ENDED
                self._changed.notify_all()

    @property
    def lacks_stripes(self) -> bool:
        """Whether stripes of its call have not joined yet."""
        return self.state is TransferState.OPEN and self._lacking_count > 0

    # For the thread that serves the call

    def receive_into(self, arrays: Sequence[Array]) -> StripedTransfer:
        """See `StripedElements`."""
        operands = LandingPieces(arrays)
        with self._changed:
            self._operands = operands
            self._progressed_s = time.monotonic()
            self._changed.notify_all()
        return self

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """See `ArrivalProgress`. Raises as `CallContext.check`, or UnavailableError if stripes do not come."""
        operands = self._operands
        assert operands is not None, "the call has not begun to receive"
        if operands.landed_bytes >= size_bytes:
            return True
        with self._arrived:
            self._awaited_bytes = size_bytes
            self._arrived.wait_for(
                lambda: operands.landed_bytes >= size_bytes or self.state is not TransferState.OPEN,
                timeout_s,
            )
            if operands.landed_bytes >= size_bytes:
                return True
            self._check_stripes()
        self._open_call.check()
        return False

    def send_from(self, arrays: Sequence[Array]) -> None:
        """See `StripedElements`."""
        space = PieceSpace(arrays)
        with self._changed:
            self._results = space
            self._run_length = run_length(self._stripes_count, space.pieces_count)
            self._result_sizes = [array.nbytes for array in arrays]
            self._written_sizes = [0] * len(arrays)
            self._changed.notify_all()

    def note_written(self, index: int, size_bytes: int) -> None:
        """See `StripedElements`."""
        with self._changed:
            self._written_sizes[index] = size_bytes
            assert self._results is not None
            before_count = self._results.count_before(self._written_bytes)
            self._written_bytes = 0
            for written_bytes, result_bytes in zip(
                self._written_sizes, self._result_sizes, strict=True
            ):
                self._written_bytes += written_bytes
                if written_bytes < result_bytes:
                    break
            if self._results.count_before(self._written_bytes) > before_count:
                self._changed.notify_all()

    def finish(self) -> None:
        """See `StripedElements`. If the client has gone, its stripes are broken, and what they have written decides."""
        call = self._open_call
        with self._changed:
            self._is_computed = True
            self._progressed_s = time.monotonic()
            while not call.is_cancelled and (self._members or self._lacking_count):
                self._check_stripes()
                remaining_s = call.remaining_s()
                if remaining_s == 0:
                    call.check()
                self._changed.wait(
                    STRIPE_WAIT_S if remaining_s is None else min(remaining_s, STRIPE_WAIT_S)
                )
            self._changed.wait_for(lambda: not self._members)
            if self._ended_count < self._stripes_count:
                call.check()

    def end(self) -> None:
        """See `StripedElements`."""
        with self._changed:
            self.state = TransferState.ENDED
            self._changed.notify_all()
        self.shutdown()
        with self._changed:
            self._changed.wait_for(lambda: not self._members)
            self._operands = self._results = None

    def shutdown(self) -> None:
        """Break the connections of all stripes that are not done, from any thread and without waiting."""
        with self._lock:
            members = [*self._members]
        for member in members:
            member.shutdown()

    @property
    def blocked_since_s(self) -> float:
        """See `ClientWait`. It has waited for as long as none of its stripes has sent or received anything."""
        with self._lock:
            if (
                self.state is not TransferState.OPEN
                or self._operands is None
                or (self._has_landed() and not self._is_computed)
            ):
                return math.inf
            waits = [
                m.wait.blocked_since_s for m in self._members if m.state is StripeState.TRANSFERRING
            ]
            return max([self._progressed_s, *waits])

    # For stripes

    def wait_until_open(self, member: StripeMember, timeout_s: float) -> CallContext:
        """Wait for the call, and return it.

        Raises:
            ConnectionClosedError: It has not come, or the stripe is none of its.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.state is not TransferState.EXPECTED or member not in self._members,
                timeout_s,
            )
            if self._call is None:
                raise ConnectionClosedError("the call of a stripe has not come")
            if member not in self._members:
                raise ConnectionClosedError("a striped call has more stripes than it announced")
            return self._call

    def wait_until_receivable(self) -> None:
        """Wait until the operands have memory to arrive in. Raises ConnectionClosedError once the call has ended."""
        with self._changed:
            while self._operands is None:
                self._check_open()
                self._changed.wait()

    def begin_landing(self, number: int, size_bytes: int) -> tuple[int, list[memoryview]]:
        """Return how many pieces of operands a run has that comes next, and where to put it.

        Args:
            number: The first of them.
            size_bytes: The size of the run.

        Raises ConnectionClosedError if the call has ended, or the run must not come.
        """
        with self._lock:
            self._check_open()
            assert self._operands is not None
            try:
                return self._operands.begin(number, size_bytes)
            except WrongRunError as error:
                reason = f"each piece of a striped call must come once: {error}"
        raise self.refuse(reason)

    def note_landed(self, number: int, count: int) -> None:
        """Note that a run of pieces of operands has landed."""
        with self._lock:
            assert self._operands is not None
            self._operands.note_landed(number, count)
            if self._operands.landed_bytes >= self._awaited_bytes:
                self._arrived.notify()

    def end_landing(self) -> None:
        """Note that a stripe has no more operands. Raises ConnectionClosedError if it was the last, and some lack."""
        with self._lock:
            self._landing_count -= 1
            self._progressed_s = time.monotonic()
            assert self._operands is not None
            pieces_count, lacking_count = (
                self._operands.pieces_count,
                self._operands.lacking_count,
            )
            if self._landing_count or not lacking_count:
                return
        raise self.refuse(
            f"a striped call must have all pieces of its operands: {lacking_count} of "
            f"{pieces_count} have not come"
        )

    def take_result(self) -> tuple[int, list[memoryview]] | None:
        """Wait until more pieces of the results are final. Return the number of the first, and where a run of them is.

        Return None if all are taken.

        Raises ConnectionClosedError once the call has ended.
        """
        with self._changed:
            while True:
                self._check_open()
                results = self._results
                if results is not None:
                    number = self._taken_count
                    if number == results.pieces_count:
                        return None
                    written_count = results.count_before(self._written_bytes) - number
                    if written_count:
                        count = min(written_count, self._run_length)
                        self._taken_count += count
                        return number, results.buffers(number, count)
                self._changed.wait()

    def drop(self, member: StripeMember) -> None:
        """Note that a stripe's connection ends before its part is done: fails the call. Does not wait."""
        with self._changed:
            if member not in self._members:
                return
            if self.state is TransferState.EXPECTED:
                del self._members[member]
                self._changed.notify_all()
                return
        self.fail(
            UnavailableError(
                "a connection of the striped call has ended before all its elements were there",
                retry_after_s=_RETRY_AFTER_S,
            )
        )

    def fail(self, error: DeconvdError) -> None:
        """End the call with an error. Nothing happens if the call has ended, or has not come."""
        if self._call is not None and self.state is TransferState.OPEN:
            self._call.stop(error)

    def refuse(self, reason: str) -> ConnectionBrokenError:
        """Fail the call, as its client has broken a rule; return the error for the connection."""
        self.fail(InvalidArgumentError(reason))
        return ConnectionClosedError(reason)

    @property
    def _open_call(self) -> CallContext:
        assert self._call is not None, "the call has not come"
        return self._call

    def _has_landed(self) -> bool:
        return (
            self._operands is not None and self._operands.landed_bytes == self._operands.size_bytes
        )

    def _check_stripes(self) -> None:
        """Raise UnavailableError if stripes should have come long ago: the client may not know that one has broken."""
        if self.lacks_stripes and time.monotonic() >= self._opened_s + STRIPE_WAIT_S:
            raise UnavailableError(
                f"the striped call lacks {self._lacking_count} of its connections after {STRIPE_WAIT_S:g} s",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _check_open(self) -> None:
        if self.state is not TransferState.OPEN:
            raise ConnectionClosedError("the striped call has ended")

    def _break(self) -> None:
        """Break all stripes: the call has been cancelled."""
        with self._changed:
            if self.state is TransferState.OPEN:
                self.state = TransferState.BROKEN
            self._changed.notify_all()
            self._arrived.notify_all()
        self.shutdown()
