"""A direct call of many parts: they are sent while the response is received, or before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Final, TypeVar

from google.protobuf.message import Message

from deconvd.direct_events import CallHead, End
from deconvd.direct_protocol import State
from deconvd.line import FrameSource, Line
from deconvd.line_errors import LineBrokenError
from deconvd.parts import Elements, Part
from deconvd_client.transport import Conversation
from deconvd_client.uninterrupted import NotYetError, Promise, do_beside

__all__ = ["converse"]

_T = TypeVar("_T")

_PIECE_BYTES: Final = 16 << 20
"""What is sent between two looks at whether the server has refused the call."""

_SENT_S: Final = 5.0
"""How long a thread may take to notice that what it sends on is broken; only an interrupt lets it take so long."""


def converse(line: Line, talk: Conversation[_T], timeout_s: float) -> tuple[_T, str]:
    """Make a call on a line that it has to itself. See `DirectTransport.stream`."""
    first = next(talk.parts)
    assert isinstance(first, Message)
    line.send(CallHead(talk.method, timeout_s, first.SerializeToString()))
    source = FrameSource(line, talk.response_type)
    # only some methods have more to say
    has_more = line.protocol.state is State.STREAMING
    with _Sending(line, talk.parts, at_once=talk.at_once) if has_more else nullcontext():
        received = talk.receive(source)
    return received, source.ledger


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
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
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
