"""Serves the calls of one direct connection by their methods, and sends their answers and failures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from typing import Any, Final

from google.protobuf.message import Message
from google.rpc import status_pb2

from deconvd.direct.connection_errors import (
    ConnectionBrokenError,
    ConnectionClosedError,
    MessageTooLargeError,
)
from deconvd.direct.events import (
    Answer,
    CallFailure,
    CallHead,
    EndOfStream,
    StripedCallHead,
)
from deconvd.direct.frame_stream import FrameSource, FrameStream
from deconvd.direct.protocol import ProtocolState
from deconvd.errors import ExhaustedError
from deconvd.wire.codec import Envelope, encode
from deconvd.wire.stream_parts import PartReader
from deconvd_server.call.context import CallContext, CallerGoneError
from deconvd_server.log_text import excerpt
from deconvd_server.service.method import (
    BidiStreamingMethod,
    ClientStreamingMethod,
    OverlappedRequest,
    Parts,
    RpcMethod,
    ServerStreamingMethod,
    UnaryMethod,
)
from deconvd_server.transports.direct.greeter import GreetedClient
from deconvd_server.transports.direct.transfers import TransferTable
from deconvd_server.transports.direct.write_progress import WriteProgress
from deconvd_server.transports.observers import Observer
from deconvd_server.transports.serve import CallScope

__all__ = ["Responder"]

_FAILURE_SEND_S: Final = 5.0
"""How long a client may take, after its deadline, to receive the failure of its call."""

_ABORT_SEND_S: Final = 0.2
"""How long a client may take to receive that its call was aborted. The process is about to end."""

_log = logging.getLogger(__name__)


class Responder:
    """Serves one call after the other, each in the thread that asks for it.

    Args:
        client: Whose calls they are.
        frames: Those of the connection to it.
        transfers: The striped calls, shared by all direct connections of the server.
        observers: They are told of every call.
    """

    def __init__(
        self,
        client: GreetedClient,
        frames: FrameStream,
        transfers: TransferTable,
        observers: Sequence[Observer],
    ) -> None:
        self._frames = frames
        self._stream = client.stream
        self._transfers = transfers
        self._peer = client.peer
        self._peer_key = client.caller_pass.caller.peer_key
        self._observers = observers
        # Of one item while a call is under way that may be answered by one frame: who takes the item answers, the
        # thread that serves it or `abort`. To take it is atomic in the interpreter, and costs less than a lock.
        self._unanswered: list[CallContext] = []

    def serve(self, method: RpcMethod, head: CallHead | StripedCallHead, call: CallContext) -> None:
        """Serve a call, and send its answer or its failure.

        Raises:
            ConnectionBrokenError: The connection is of no more use.
        """
        self._frames.set_deadline(head.timeout_s + _FAILURE_SEND_S)
        scope = CallScope(method.name, call, self._observers)
        with scope:
            try:
                if isinstance(head, StripedCallHead):
                    self._respond_striped(method, head, call)
                else:
                    self._respond(method, head, call)
            except MessageTooLargeError as error:
                raise ExhaustedError(
                    f"the response has {error}: it must be requested by gRPC"
                ) from None
            except ConnectionBrokenError as error:
                raise CallerGoneError(str(error)) from error
        self._unanswered.clear()
        if scope.failure is not None and not self._frames.protocol.is_idle:
            self._send_failure(scope.failure)

    def abort(self, failure: status_pb2.Status) -> None:
        """End the call under way with a failure, even if the thread that serves it hangs. Others break off.

        Any thread may call this. A call in parts, and a striped one, may be amid a frame: its connection is closed.
        """
        try:
            self._unanswered.pop()
        except IndexError:
            self._frames.shutdown()
            return
        self._frames.set_deadline(_ABORT_SEND_S)
        try:
            self._frames.send(CallFailure(failure))
        except ConnectionBrokenError as error:
            _log.debug("%s is not told of the failure: %s", self._peer, excerpt(error))

    def _respond(self, method: RpcMethod, head: CallHead, call: CallContext) -> None:
        if not isinstance(method, UnaryMethod):
            call.client_wait, call.close_stream = self._stream, self._frames.shutdown
        match method:
            case UnaryMethod():
                request = method.decode_request(head.message)
                if head.is_overlapped:
                    progress = WriteProgress(self._frames, head.written_bytes)
                    call.client_wait, call.close_stream = progress, self._frames.shutdown
                    request = OverlappedRequest.of(request, progress)
                self._unanswered.append(call)
                response = method.serve(request, call)
                try:
                    self._unanswered.pop()
                except IndexError:
                    raise CallerGoneError("the call was aborted") from None
                self._send_answer(call, response)
                return
            case ServerStreamingMethod():
                parts = method.serve(method.decode_request(head.message), call)
            case BidiStreamingMethod():
                parts = method.serve(self._reader(method, head.message), call)
            case ClientStreamingMethod():
                parts = _single_part(method.serve(self._reader(method, head.message), call))
            case _:
                raise ConnectionBrokenError(f"{method.name} is not served directly")
        with closing(parts):
            for part in parts:
                self._frames.send_part(part)
        self._frames.send(EndOfStream(call.ledger.as_text()))

    def _respond_striped(self, method: RpcMethod, head: StripedCallHead, call: CallContext) -> None:
        """Serve a striped call. It is answered while its stripes still send results.

        If that fails after the answer, the stripes end without their END, by which the client knows.
        """
        if not isinstance(method, UnaryMethod) or method.serve_striped is None:
            raise ConnectionBrokenError(f"{method.name} cannot be striped")
        _log.debug("%s from %s: in %d stripes", method.name, self._peer, head.stripes_count)
        with self._transfers.open(
            head.transfer, self._peer_key, head.stripes_count, call
        ) as transfer:
            call.client_wait, call.close_stream = transfer, transfer.shutdown
            request = method.decode_request(head.message)
            method.serve_striped(
                request, transfer, partial(self._send_answer, call, limits_stripes=True), call
            )

    def _send_answer(
        self, call: CallContext, response: Envelope[Message], *, limits_stripes: bool = False
    ) -> None:
        stripes_limit = self._transfers.stripes_limit if limits_stripes else 0
        self._frames.send(Answer(encode(response), call.ledger.as_text(), stripes_limit))

    def _reader(
        self, method: BidiStreamingMethod | ClientStreamingMethod, message: bytes
    ) -> PartReader[Any]:
        return method.reader(FrameSource(self._frames, method.request_type, message))

    def _send_failure(self, failure: status_pb2.Status) -> None:
        """Send a failure. If the call has parts, that ends the connection.

        The rest of the request may be on its way: it is read and dropped, since a socket that is closed with unread
        bytes discards what it has sent, and so the failure.
        """
        self._frames.send(CallFailure(failure))
        if self._frames.protocol.state is ProtocolState.CLOSED:
            self._frames.half_close_and_drain(_FAILURE_SEND_S)
            raise ConnectionClosedError("a call in parts has failed")


def _single_part(message: Message) -> Parts:
    yield message
