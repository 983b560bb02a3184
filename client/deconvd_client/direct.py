"""Direct calls: without gRPC, on lines that are kept for the next calls. See `deconvd.direct_protocol`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Final, TypeVar

from deconvd.busy_polling import BusyPolling
from deconvd.direct_events import Answer, CallHead, Failed, Method
from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError
from deconvd.forks import begin_anew_in_children, new_lock
from deconvd.ledger import FOLLOW_ENTRY
from deconvd.line import Line, tell_written
from deconvd.line_errors import LineBrokenError, LineTimeoutError
from deconvd.status import error_from_status
from deconvd.trials import Trials
from deconvd_client.backoff import Backoff
from deconvd_client.deadline import Deadline
from deconvd_client.direct_call import converse
from deconvd_client.direct_ways import Ask, Way
from deconvd_client.late_copy import LateCopy
from deconvd_client.transport import Conversation, LostLineError, NoLineError
from deconvd_client.uninterrupted import call_uninterrupted, do_beside

__all__ = ["DirectTransport"]

_T = TypeVar("_T")

_OPEN_S: Final = 10.0
"""How long a thread may take to open a line."""

_PATIENCE_S: Final = 0.1
"""How long calls wait for a line that is being opened before they go by gRPC."""

_AHEAD_S: Final = 4e-4
_POLLED_S: Final = 8e-4
"""From so long before an answer usually comes, and for so long, a client that waits for it polls."""

_IDLE_COUNT: Final = 16
"""Lines that are kept for later calls."""

_METHODS: Final = {method.name: method for method in Method}

_log = logging.getLogger(__name__)


class DirectTransport:
    """Carries calls directly, by lines of its own, one at a time on each. See `Transport`.

    Args:
        way: How a line is opened.
        ask: Asks the server what it is.
    """

    def __init__(self, way: Way, ask: Ask) -> None:
        self._way = way
        self._ask = ask
        self._is_closed = False
        self._backoff = Backoff()
        self._polling = BusyPolling(_POLLED_S, ahead_s=_AHEAD_S)
        self._early_calls = Trials()
        self._lock = new_lock()  # never held while anything is sent, or waited for
        self.begin_anew_in_child()
        begin_anew_in_children(self)

    def begin_anew_in_child(self) -> None:
        """Have no lines yet, as in a forked child."""
        self._idle: list[Line] = []
        # Those that calls have. A call that was broken off by an interrupt may not have said that it ended:
        # its line closes itself once nothing refers to it.
        self._busy: set[weakref.ref[Line]] = set()
        self._is_opening = False
        self._waiting: list[SimpleQueue[None]] = []  # for what the opener opens

    @property
    def is_worth_asking(self) -> bool:
        """Whether calls may get a line: the server has let the last one be opened, or was asked long ago."""
        return not self._is_closed and not self._backoff.is_pending

    @property
    def may_carry(self) -> bool:
        """Whether there is a line for a call, or may be one."""
        return bool(self._idle) or self.is_worth_asking

    def unary(
        self, method: str, request: bytes, deadline: Deadline, late_copy: LateCopy | None = None
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger.

        Raises:
            NoLineError: It is to be made in another way.
            DeconvdError: What the server raised.
            DeadlineError: There was no answer in time.
            CallCancelledError: `close` was called meanwhile.
        """
        if late_copy is not None and not self._early_calls.is_due():
            late_copy.make()
        early = late_copy if late_copy is not None and not late_copy.is_made else None
        written_bytes = early.written_bytes if early is not None else 0
        with self._line(deadline) as lent:
            line, is_early = lent.line, early is not None
            head = CallHead(_METHODS[method], lent.timeout_s, request, is_early, written_bytes)
            line.send(head)
            if early is not None:
                with suppress(_AnsweredError):
                    early.make(partial(_tell_written, line))
            self._polling.wait(line, self._is_alone)
            answer = line.next_event()
            if isinstance(answer, Failed):
                raise error_from_status(answer.status)
        assert isinstance(answer, Answer), answer  # nothing else may come
        if is_early:
            # a server that computes on the host, or for others too, does not follow: then it costs both
            # ends more to speak of progress than it saves
            self._early_calls.note(has_paid=FOLLOW_ENTRY in answer.ledger)
        return answer

    def stream(self, begin: Callable[[], Conversation[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger.

        Raises:
            As `unary`, and what the conversation's functions raise.
        """
        with self._line(deadline) as lent:
            return converse(lent.line, begin(), lent.timeout_s)

    def close(self) -> None:
        """Close all lines. Calls under way end with CallCancelledError."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            busy = [line for known in self._busy if (line := known()) is not None]
        for line in busy:
            line.shut()
        for line in idle:
            line.close()

    def __str__(self) -> str:
        with self._lock:
            busy_count = sum(known() is not None for known in self._busy)
            count = busy_count + len(self._idle)
        if not count:
            return "no direct connection"
        busy = f" ({busy_count} busy)" if busy_count else ""
        return f"{count} direct connection{'s' if count > 1 else ''}{busy}"

    def _is_alone(self) -> bool:
        """Return whether no other thread has a call under way."""
        return len(self._busy) == 1

    def _line(self, deadline: Deadline) -> _LentLine:
        """Lend a line to a block, and keep it if the block has left it in order."""
        line = self._take(deadline)
        timeout_s = deadline.remaining_s()
        line.set_deadline(timeout_s)
        return _LentLine(line, timeout_s, self._end_use)

    def _end_use(self, line: Line, error: BaseException | None) -> None:
        """Take a line back. Raises what the calling block is to raise, if that is another error than its own."""
        self._give_back(line, error)
        if isinstance(error, LineTimeoutError):
            raise DeadlineError("the server did not answer in time") from None
        if isinstance(error, LineBrokenError):
            if self._is_closed:
                raise CallCancelledError("the connection is closed") from None
            _log.debug("a direct line was lost: %s", error)
            raise LostLineError from None

    def _take(self, deadline: Deadline) -> Line:
        """Return a line for one call. Raises NoLineError if there is none."""
        taken = self._take_idle()
        if taken is None and self.is_worth_asking:
            is_quick = self._way.is_quick
            opened = call_uninterrupted(lambda: self._open(deadline)) if is_quick else None
            if opened is not None:
                return self._keep(opened, is_taken=True)
            if not deadline.remaining_s():  # which says nothing of the server
                raise DeadlineError("the call's deadline passed while a line was opened")
            self._open_beside(deadline)
            taken = self._take_idle()
        if taken is None:
            raise NoLineError
        return taken

    def _take_idle(self) -> Line | None:
        """Return a line that is not in use, if there is one that the server has not closed."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                idle = self._idle.pop()
                self._note_busy(idle)
            if idle.is_quiet():
                return idle
            with self._lock:
                self._busy.discard(weakref.ref(idle))
            idle.close()

    def _note_busy(self, line: Line) -> None:
        if self._busy:
            self._busy = {known for known in self._busy if known() is not None}
        self._busy.add(weakref.ref(line))

    def _give_back(self, line: Line, error: BaseException | None) -> None:
        with self._lock:
            self._busy.discard(weakref.ref(line))
            is_wanted = not self._is_closed and len(self._idle) < _IDLE_COUNT
            is_kept = is_wanted and line.protocol.is_idle
            if is_kept:
                self._idle.append(line)
        if is_kept:
            return
        if error is None or isinstance(error, (DeconvdError, LineBrokenError)):
            line.close()
        else:
            # after an interrupt a thread may still be sending: the line closes itself once none refers to it
            line.shut()

    def _open_beside(self, deadline: Deadline) -> None:
        """Open one more line in a thread, and wait for it for a moment."""
        opened: SimpleQueue[None] = SimpleQueue()
        with self._lock:
            self._waiting.append(opened)
            if not self._is_opening:
                do_beside(self._open_slowly)
        with suppress(Empty):
            opened.get(timeout=min(_PATIENCE_S, deadline.remaining_s()))

    def _open_slowly(self) -> None:
        with self._lock:
            if self._is_opening:
                return  # another thread was asked at the same time
            self._is_opening = True
        line = self._open(Deadline(_OPEN_S))
        with suppress(NoLineError):  # the calls go by gRPC
            self._keep(line)
        with self._lock:
            self._is_opening = False
            waiting, self._waiting = self._waiting, []
        for opened in waiting:
            opened.put(None)

    def _open(self, deadline: Deadline) -> Line | None:
        """Return a new line; None if the server opens none, whatever the reason."""
        try:
            return self._way.open(self._ask, deadline.remaining_s())
        except Exception as error:  # noqa: BLE001 - gRPC serves the call, whatever the reason
            _log.debug("no direct calls: %s", error)
            return None

    def _keep(self, opened: Line | None, *, is_taken: bool = False) -> Line:
        """Keep a new line for a later call, or for that of this thread.

        Raises:
            NoLineError: There is none. The server is left in peace for a while.
        """
        with self._lock:
            if opened is None:
                self._backoff.note_failure()
            elif not self._is_closed:
                self._backoff.note_success()
                if is_taken:
                    self._note_busy(opened)
                else:
                    self._idle.append(opened)
                return opened
        if opened is not None:
            opened.close()
        raise NoLineError


@dataclass(slots=True)
class _LentLine(AbstractContextManager["_LentLine"]):
    """A line that a call has to itself, for the length of a block.

    Attributes:
        timeout_s: How long the call may take from now on.
        on_end: Called at the block's end with the line and the error that the block has raised, if any.
    """

    line: Line
    timeout_s: float
    on_end: Callable[[Line, BaseException | None], None]

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.on_end(self.line, exc)


class _AnsweredError(Exception):
    """The server has answered before it had all operands: it refuses the call, or does not need the rest."""


def _tell_written(line: Line, size_bytes: int) -> None:
    """Say how far an early call's operands are written."""
    if not line.is_quiet():
        raise _AnsweredError
    with suppress(LineBrokenError):  # that is for who waits for the answer to find
        tell_written(line, size_bytes)
