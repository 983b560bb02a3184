"""A call of many parts on a direct connection: they are sent while the response is received, or before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import Final, TypeVar

from google.protobuf.message import Message

from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import CallHead, EndOfStream
from deconvd.direct.frame_stream import FrameSource, FrameStream
from deconvd.direct.protocol import ProtocolState
from deconvd.wire.stream_parts import Part
from deconvd_client.calls.responses import MALFORMED_ERRORS, malformed_response
from deconvd_client.calls.transport import StreamAttempt
from deconvd_client.calls.uninterrupted import Promise, PromiseTimeoutError, run_in_background

__all__ = ["run_stream_attempt"]

_T = TypeVar("_T")

_PIECE_BYTES: Final = 16 << 20
"""What is sent between two checks whether the server has refused the call."""

_SENDER_EXIT_TIMEOUT_S: Final = 5.0
"""How long the sending thread may take to notice that the connection is broken; only an interrupt makes it so long."""


def run_stream_attempt(
    connection: FrameStream, attempt: StreamAttempt[_T], timeout_s: float
) -> tuple[_T, str]:
    """Make a call of many parts on a connection that no other call uses. See `DirectTransport.stream`."""
    first = next(attempt.parts)
    assert isinstance(first, Message)
    connection.send(CallHead(attempt.method, timeout_s, first.SerializeToString()))
    source = FrameSource(connection, attempt.response_type)
    if connection.protocol.state is not ProtocolState.STREAMING:
        return _receive(attempt, source), source.ledger  # the first message is the whole request
    with _RequestSender(connection, attempt.parts, is_full_duplex=attempt.is_full_duplex):
        received = _receive(attempt, source)
    return received, source.ledger


def _receive(attempt: StreamAttempt[_T], source: FrameSource) -> _T:
    """Return what the attempt reads. What it finds wrong is the server's fault, unless the server itself says it."""
    try:
        return attempt.receive(source)
    except MALFORMED_ERRORS as error:
        if error is source.failure:
            raise
        raise malformed_response(attempt.response_type, error) from None
    finally:
        source.failure = (
            None  # its traceback refers to this frame: a cycle, which would keep the arrays
        )


class _RequestSender(AbstractContextManager[None]):
    """Sends the parts of a request before a block receives the response, or in another thread meanwhile.

    If either side fails the connection is shut down, so that the other ends too. An error of the connection while
    sending is not raised: the block will find the reason, since the server may have said it.
    """

    def __init__(
        self, connection: FrameStream, parts: Iterator[Part], *, is_full_duplex: bool
    ) -> None:
        self._connection = connection
        self._parts = parts
        self._is_full_duplex = is_full_duplex
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
        self._connection.shutdown()  # or the thread would go on sending
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
                if self._is_full_duplex or isinstance(part, Message):
                    self._connection.send_part(part)
                    continue
                for piece in part.pieces(_PIECE_BYTES):
                    # nobody receives yet, so look whether the server has refused the call; the block will hear why
                    if self._connection.is_failure_next():
                        return
                    self._connection.send_part(piece)
            self._connection.send(EndOfStream())
