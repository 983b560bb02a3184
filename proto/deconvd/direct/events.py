"""The frames of direct connections: events to bytes, and back. Pure.

All numbers are little-endian. `deconvd.direct.protocol` says which frame may be sent when. A frame is

    +------+------------+-------------------+---------+
    | kind | zero bytes | size of payload   | payload |
    +------+------------+-------------------+---------+
    1 byte   3 bytes      4 bytes

The payload of each kind, with the messages of the service as in deconvd.proto:

    client   HELLO              once: "dcd7", then the instance id of the wanted server (16 bytes; zeros for any
                                server), then the client's token, if it has one (ASCII)
             CALL               method (1 byte), whether the call is overlapped (1 byte: 0 or 1), 6 zero bytes,
                                timeout in microseconds (8 bytes), bytes written so far if it is overlapped (8 bytes),
                                the request message; for a method that streams its request, its first message
             PROGRESS           in an overlapped call: bytes of the operands that are written by now (8 bytes)
             ELEMENTS           in a streamed request: the next elements, as in Tensor.raw; not empty
             PACKED_ELEMENTS    in a streamed request: the next elements, packed (see `deconvd.wire.packed_elements`)
             END                the streamed request, or the client's part of a stripe, is complete; no payload
             STRIPED_CALL       method (1 byte), how many stripes the call has (1 byte), 6 zero bytes, timeout in
                                microseconds (8 bytes), the transfer's id (16 bytes), the request message
             STRIPE             the id of the transfer that this connection is a stripe of (16 bytes)
             PIECE              the number of the first piece whose elements follow in one ELEMENTS frame (8 bytes)

    server   HELLO              once: "dcd7", then the server's own instance id (16 bytes)
             ANSWER             success of a method without streams: size of the ledger (2 bytes), how many stripes a
                                call should have at most for now (1 byte; 0 if the server does not say), 5 zero bytes,
                                the ledger (ASCII; see `deconvd.wire.ledger`), the response message
             MESSAGE            the response message of a method with streams, or one of its messages
             ELEMENTS           the next elements of a streamed response; not empty
             PACKED_ELEMENTS    in a streamed response whose request allows it: the next elements, packed
             PIECE              as the client's
             END                success of a method with streams: the ledger; in a stripe: all pieces are sent, no
                                payload
             FAILED             failure of any method: a google.rpc.Status
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from deconvd.direct.connection_errors import RemoteProtocolError
from deconvd.direct.frames import (
    CALL_KINDS,
    FRAME_HEAD,
    FRAME_HEAD_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_TIMEOUT_S,
    METHODS,
    FrameKind,
    MethodCode,
    pack_frame,
)
from deconvd.direct.stripe_events import (
    MAX_STRIPES_COUNT,
    PIECE_HEAD_BYTES,
    STRIPE_HEAD_BYTES,
    STRIPED_CALL_BYTES,
    TRANSFER_ID_BYTES,
    PieceHead,
    StripedCallHead,
    StripeHead,
)
from deconvd.wire.packed_elements import MAX_PACKED_BYTES, MIN_PACKED_BYTES

__all__ = [
    "ANY_INSTANCE",
    "EVENT_PARSERS",
    "FRAME_HEAD",
    "FRAME_HEAD_BYTES",
    "FRAME_KINDS",
    "MAX_MESSAGE_BYTES",
    "MAX_STRIPES_COUNT",
    "PAYLOAD_SIZES",
    "TRANSFER_ID_BYTES",
    "Answer",
    "CallFailure",
    "CallHead",
    "EndOfStream",
    "Event",
    "FrameKind",
    "Hello",
    "MessagePart",
    "MethodCode",
    "PieceHead",
    "ProgressReport",
    "StripeHead",
    "StripedCallHead",
    "pack_frame",
]

ANY_INSTANCE: Final = bytes(16)
"""In place of an instance id: any server."""

_MAGIC: Final = b"dcd7"
_HELLO: Final = struct.Struct("<4s16s")
_MAX_TOKEN_BYTES: Final = 512
_CALL: Final = struct.Struct("<B?6xQQ")
_PROGRESS: Final = struct.Struct("<Q")
_ANSWER: Final = struct.Struct("<HB5x")
_CALL_FRAME: Final = struct.Struct("<B3xIB?6xQQ")
_ANSWER_FRAME: Final = struct.Struct("<B3xIHB5x")


class Hello(NamedTuple):
    """The handshake of either end.

    Attributes:
        instance: From a client: the id of the wanted server, or `ANY_INSTANCE`. From a server: its own id.
        token: From a client: the secret that says who it is; empty if it has none. It is not in the event's `repr`.
    """

    instance: bytes
    token: str = ""

    def __repr__(self) -> str:
        return f"Hello({self.instance!r}{', with a token' if self.token else ''})"

    def pack(self) -> bytes:
        """Return the event's frame."""
        payload = _HELLO.pack(_MAGIC, self.instance) + self.token.encode("ascii")
        return pack_frame(FrameKind.HELLO, payload)

    @classmethod
    def parse(cls, payload: bytes) -> Hello:
        """Return the event in a payload. Raises RemoteProtocolError if the payload is of another protocol."""
        magic, instance = _HELLO.unpack_from(payload)
        if magic != _MAGIC:
            raise RemoteProtocolError("the peer's handshake belongs to another protocol or version")
        token = payload[_HELLO.size :]
        if not token.isascii():
            raise RemoteProtocolError("the peer's handshake has a token that is not ASCII")
        return cls(instance, token.decode("ascii"))


class CallHead(NamedTuple):
    """The first frame of a call.

    Attributes:
        timeout_s: How long the caller waits for the end of the call, in seconds.
        message: The request message; for a streamed request, the first message.
        is_overlapped: Whether the client is still writing operands to shared memory.
        written_bytes: How many bytes of them are already written.
    """

    method: MethodCode
    timeout_s: float
    message: bytes
    is_overlapped: bool = False
    written_bytes: int = 0

    @property
    def kind(self) -> FrameKind:
        """The kind of the call, which decides what may follow it."""
        return FrameKind.OVERLAPPED_CALL if self.is_overlapped else CALL_KINDS[self.method]

    def pack(self) -> bytes:
        """Return the event's frame."""
        method, timeout_s, message, is_overlapped, written_bytes = self
        timeout_us = max(int(min(timeout_s, MAX_TIMEOUT_S) * 1e6), 0)
        payload_bytes = _CALL.size + len(message)
        head = _CALL_FRAME.pack(
            FrameKind.CALL, payload_bytes, method, is_overlapped, timeout_us, written_bytes
        )
        return head + message

    @classmethod
    def parse(cls, payload: bytes) -> CallHead:
        """Return the event in a payload. Raises RemoteProtocolError if the method cannot be called so."""
        number, is_overlapped, timeout_us, written_bytes = _CALL.unpack_from(payload)
        method = METHODS.get(number)
        if method is None:
            raise RemoteProtocolError(f"the peer called an unknown method, number {number}")
        if is_overlapped and CALL_KINDS[method] is not FrameKind.CALL:
            raise RemoteProtocolError(
                f"the peer made an overlapped call of {method.name}, which cannot be overlapped"
            )
        return cls(method, timeout_us / 1e6, payload[_CALL.size :], is_overlapped, written_bytes)


class ProgressReport(NamedTuple):
    """How far the client has written the operands of an overlapped call."""

    written_bytes: int

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.PROGRESS, _PROGRESS.pack(self.written_bytes))

    @classmethod
    def parse(cls, payload: bytes) -> ProgressReport:
        """Return the event in a payload."""
        return cls(*_PROGRESS.unpack(payload))


class MessagePart(NamedTuple):
    """A response message of a method with streams."""

    data: bytes

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.MESSAGE, self.data)


class EndOfStream(NamedTuple):
    """The end of a streamed request or response.

    Attributes:
        ledger: The call's ledger at the end of a response. Empty at the end of a request.
    """

    ledger: str = ""

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.END, self.ledger.encode())

    @classmethod
    def parse(cls, payload: bytes) -> EndOfStream:
        """Return the event in a payload."""
        return cls(payload.decode("ascii", errors="replace"))


class Answer(NamedTuple):
    """The end of a successful call of a method without streams.

    Attributes:
        message: The response message.
        ledger: The call's ledger.
        stripes_limit: How many stripes a call should have at most, for now. 0 if the server does not say.
    """

    message: bytes
    ledger: str
    stripes_limit: int = 0

    def pack(self) -> bytes:
        """Return the event's frame."""
        message, ledger = self.message, self.ledger.encode()
        payload_bytes = _ANSWER.size + len(ledger) + len(message)
        head = _ANSWER_FRAME.pack(FrameKind.ANSWER, payload_bytes, len(ledger), self.stripes_limit)
        return b"".join((head, ledger, message))

    @classmethod
    def parse(cls, payload: bytes) -> Answer:
        """Return the event in a payload. Raises RemoteProtocolError if the payload ends inside the ledger."""
        ledger_bytes, stripes_limit = _ANSWER.unpack_from(payload)
        end = _ANSWER.size + ledger_bytes
        if len(payload) < end:
            raise RemoteProtocolError(
                f"the peer sent an answer of {len(payload)} bytes, whose ledger alone ends at byte {end}"
            )
        ledger = payload[_ANSWER.size : end].decode("ascii", errors="replace")
        return cls(payload[end:], ledger, stripes_limit)


class CallFailure(NamedTuple):
    """The end of a failed call."""

    status: status_pb2.Status

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.FAILED, self.status.SerializeToString())

    @classmethod
    def parse(cls, payload: bytes) -> CallFailure:
        """Return the event in a payload. Raises RemoteProtocolError if the payload is not a status."""
        try:
            return cls(status_pb2.Status.FromString(payload))
        except DecodeError:
            raise RemoteProtocolError(
                "the peer sent a failure that is not a valid google.rpc.Status"
            ) from None


Event: TypeAlias = (
    Hello
    | CallHead
    | StripedCallHead
    | StripeHead
    | PieceHead
    | ProgressReport
    | MessagePart
    | EndOfStream
    | Answer
    | CallFailure
)
"""All frames except those of elements, which are not parsed: see `DirectProtocol`."""

FRAME_KINDS: Final[Mapping[type[Event], FrameKind]] = {
    Hello: FrameKind.HELLO,
    MessagePart: FrameKind.MESSAGE,
    EndOfStream: FrameKind.END,
    CallFailure: FrameKind.FAILED,
    ProgressReport: FrameKind.PROGRESS,
    Answer: FrameKind.ANSWER,
    StripedCallHead: FrameKind.STRIPED_CALL,
    StripeHead: FrameKind.STRIPE,
    PieceHead: FrameKind.PIECE,
}
"""The kind of each event. Only a call has several: see `CallHead.kind`."""

EVENT_PARSERS: Final[Mapping[int, Callable[[bytes], Event]]] = {
    FrameKind.HELLO: Hello.parse,
    FrameKind.CALL: CallHead.parse,
    FrameKind.MESSAGE: MessagePart,
    FrameKind.END: EndOfStream.parse,
    FrameKind.FAILED: CallFailure.parse,
    FrameKind.PROGRESS: ProgressReport.parse,
    FrameKind.ANSWER: Answer.parse,
    FrameKind.STRIPED_CALL: StripedCallHead.parse,
    FrameKind.STRIPE: StripeHead.parse,
    FrameKind.PIECE: PieceHead.parse,
}

PAYLOAD_SIZES: Final[Mapping[int, range]] = {
    FrameKind.HELLO: range(_HELLO.size, _HELLO.size + _MAX_TOKEN_BYTES + 1),
    FrameKind.CALL: range(_CALL.size, MAX_MESSAGE_BYTES + 1),
    FrameKind.MESSAGE: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.ELEMENTS: range(1 << 32),
    FrameKind.PACKED_ELEMENTS: range(MIN_PACKED_BYTES, MAX_PACKED_BYTES + 1),
    FrameKind.END: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.FAILED: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.PROGRESS: range(_PROGRESS.size, _PROGRESS.size + 1),
    FrameKind.ANSWER: range(_ANSWER.size, MAX_MESSAGE_BYTES + 1),
    FrameKind.STRIPED_CALL: range(STRIPED_CALL_BYTES, MAX_MESSAGE_BYTES + 1),
    FrameKind.STRIPE: range(STRIPE_HEAD_BYTES, STRIPE_HEAD_BYTES + 1),
    FrameKind.PIECE: range(PIECE_HEAD_BYTES, PIECE_HEAD_BYTES + 1),
}
"""The sizes that a payload may have, in bytes, by the kind of frame on the wire."""
