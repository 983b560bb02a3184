"""A direct call of many parts: they are sent while the response is received, or before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Final, TypeVar

from google.protobuf.message import Message

from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import CallHead, EndOfStream
from deconvd.direct.frame_stream import FrameSource, FrameStream
from deconvd.direct.protocol import ProtocolState
from deconvd.wire.stream_parts import ElementsPart, Part
from deconvd_client.calls.transport import StreamAttempt
from deconvd_client.calls.uninterrupted import Promise, PromiseTimeoutError, run_in_background

__all__ = ["run_stream_attempt"]

_T = TypeVar("_T")

_PIECE_BYTES: Final = 16 << 20
"""What is sent between two looks at whether the server has refused the call."""

_SENDER_EXIT_TIMEOUT_S: Final = 5.0
"""How long a thread may take to notice that what it sends on is broken; only an interrupt lets it take so long."""


def run_stream_attempt(
    line: FrameStream, talk: StreamAttempt[_T], timeout_s: float
) -> tuple[_T, str]:
    """Make a call on a line that it has to itself. See `DirectTransport.stream`."""
    first = next(talk.parts)
    assert isinstance(first, Message)
    line.send(CallHead(talk.method, timeout_s, first.SerializeToString()))
    source = FrameSource(line, talk.response_type)
    # only some methods have more to say
    has_more = line.protocol.state is ProtocolState.STREAMING
    with (
        _RequestSender(line, talk.parts, at_once=talk.is_full_duplex) if has_more else nullcontext()
    ):
        received = talk.receive(source)
    return received, source.ledger


class _RequestSender(AbstractContextManager[None]):
    """Sends the parts of a request while a block receives the response: before it, or beside it.

    If either fails the line is broken, so that the other ends too. That it broke while sending is
    for the block to find: the server may have said why.
    """

    def __init__(self, line: FrameStream, parts: Iterator[Part], *, at_once: bool) -> None:
        self._connection = line
        self._parts = parts
        self._is_full_duplex = at_once
        self._completion: Promise[None] = Promise()

    def __enter__(self) -> None:
        if self._is_full_duplex:
            run_in_background(self._run)
        else:
            self._send()

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if not self._is_full_duplex:
            return
        if exc_type is None:
            self._completion.wait()
            return
        self._connection.shutdown()
        with suppress(PromiseTimeoutError):
            self._completion.wait(_SENDER_EXIT_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._send()
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the caller's
            self._connection.shutdown()
            self._completion.fail(error)
        else:
            self._completion.fulfil(None)

    def _send(self) -> None:
        with suppress(ConnectionBrokenError):
            for part in self._parts:
                for piece in (
                    part.pieces(_PIECE_BYTES) if isinstance(part, ElementsPart) else (part,)
                ):
                    if not self._is_full_duplex and self._connection.is_failure_next():
                        return  # the server does not want the rest; the block hears why
                    self._connection.send_part(piece)
            self._connection.send(EndOfStream())
