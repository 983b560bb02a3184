"""One direct call, on a line that it has to itself: it is begun, its parts are sent, its answer is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Final, TypeVar

from google.protobuf.message import Message

from deconvd.direct_events import Answer, CallHead, End, Failed, Method
from deconvd.direct_protocol import State
from deconvd.line import FrameSource, Line, tell_written
from deconvd.line_errors import LineBrokenError
from deconvd.parts import Elements, Part
from deconvd.status import error_from_status
from deconvd_client.late_copy import LateCopy
from deconvd_client.transport import Conversation
from deconvd_client.uninterrupted import NotYetError, Promise, do_beside

__all__ = ["LentLine"]

_T = TypeVar("_T")

_PIECE_BYTES: Final = 16 << 20
"""What is sent between two looks at whether the server has refused the call."""

_SENT_S: Final = 5.0
"""How long a thread may take to notice that what it sends on is broken; only an interrupt lets it take so long."""


class LentLine(AbstractContextManager["LentLine"]):
    """A line that a call has to itself, for the length of a block.

    Args:
        on_end: Called at the block's end with this and the error that the block has raised, if any.
    """

    def __init__(
        self, line: Line, on_end: Callable[[LentLine, BaseException | None], None]
    ) -> None:
        self.line = line
        self._on_end = on_end

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._on_end(self, exc)

    def begin(
        self, method: Method, message: bytes, timeout_s: float, late_copy: LateCopy | None
    ) -> None:
        """Make a call: see `DirectTransport.unary`."""
        if late_copy is None:
            self.line.send(CallHead(method, timeout_s, message))
            return
        written_bytes = late_copy.written_bytes
        self.line.send(CallHead(method, timeout_s, message, True, written_bytes))
        with suppress(_AnsweredError):
            late_copy.make(self._tell_written)

    def answer(self) -> Answer:
        """Return the answer to a call that has begun."""
        event = self.line.next_event()
        if isinstance(event, Failed):
            raise error_from_status(event.status)
        assert isinstance(event, Answer), event  # nothing else may come
        return event

    def converse(self, talk: Conversation[_T], timeout_s: float) -> tuple[_T, str]:
        """See `DirectTransport.stream`."""
        first = next(talk.parts)
        assert isinstance(first, Message)
        self.line.send(CallHead(talk.method, timeout_s, first.SerializeToString()))
        source = FrameSource(self.line, talk.response_type)
        with self._sending(talk):
            received = talk.receive(source)
        return received, source.ledger

    def _sending(self, talk: Conversation[_T]) -> AbstractContextManager[None]:
        """Send the rest of a request, if its method has one, while the block receives the response."""
        if self.line.protocol.state is not State.STREAMING:
            return nullcontext()
        return _Sending(self.line, talk.parts, at_once=talk.at_once)

    def _tell_written(self, size_bytes: int) -> None:
        if not self.line.is_quiet():
            raise _AnsweredError
        with suppress(LineBrokenError):  # that is for who waits for the answer to find
            tell_written(self.line, size_bytes)


class _AnsweredError(Exception):
    """The server has answered before it had all operands: it refuses the call, or does not need the rest."""


class _Sending(AbstractContextManager[None]):
    """Sends the parts of a request while a block receives the response: before it, or beside it.

    If either fails the line is broken, so that the other ends too. That it broke while sending is
    for the block to find: the server may have said why.
    """

    def __init__(self, line: Line, parts: Iterator[Part], *, at_once: bool) -> None:
        self._line = line
        self._parts = parts
        self._at_once = at_once
        self._sent: Promise[None] = Promise()

    def __enter__(self) -> None:
        if self._at_once:
            do_beside(self._run)
        else:
            self._send()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if not self._at_once:
            return
        if exc_type is None:
            self._sent.wait()
            return
        self._line.shut()
        with suppress(NotYetError):
            self._sent.wait(_SENT_S)

    def _run(self) -> None:
        try:
            self._send()
        except BaseException as error:  # whatever it is, it is the caller's
            self._line.shut()
            self._sent.fail(error)
        else:
            self._sent.fulfil(None)

    def _send(self) -> None:
        with suppress(LineBrokenError):
            for part in self._parts:
                for piece in part.pieces(_PIECE_BYTES) if isinstance(part, Elements) else (part,):
                    if not self._at_once and self._line.next_is_failure():
                        return  # the server does not want the rest; the block hears why
                    self._line.send_part(piece)
            self._line.send(End())
