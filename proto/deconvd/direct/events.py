"""The frames of direct connections: events to bytes, and back. Pure.

All numbers are little-endian. `deconvd.direct.protocol` says which frame may be sent when. A frame is

    +------+------------+-------------------+---------+
    | kind | zero bytes | size of payload   | payload |
    +------+------------+-------------------+---------+
    1 byte   3 bytes      4 bytes

The payload of each kind, with the messages of the service as in deconvd.proto:

    client   HELLO              once: "dcd6", then the instance id of the wanted server (16 bytes; zeros for any server)
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
             PIECE              the number of the piece whose elements follow in one ELEMENTS frame (8 bytes)

    server   HELLO              once: "dcd6", then the server's own instance id (16 bytes)
             ANSWER             success of a method without streams: size of the ledger (2 bytes), 6 zero bytes, the
                                ledger (ASCII; see `deconvd.wire.ledger`), the response message
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
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from deconvd.direct.connection_errors import RemoteProtocolError
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

MAX_MESSAGE_BYTES: Final = 128 << 10
"""The largest payload other than elements: each end must be able to buffer one for each connection."""

MAX_STRIPES_COUNT: Final = 8
"""The most stripes of a call. More connections were not faster."""

TRANSFER_ID_BYTES: Final = 16
"""Size of a transfer's id. The client draws it at random, so that nobody else can join the transfer."""

FRAME_HEAD: Final = struct.Struct("<B3xI")
"""The head of a frame: its kind, and the size of its payload in bytes."""

FRAME_HEAD_BYTES: Final = FRAME_HEAD.size

_MAX_TIMEOUT_S: Final = 1e12
"""Longer timeouts are sent as this one (about 30,000 years), so that their microseconds fit into 64 bits."""

_MAGIC: Final = b"dcd6"
_HELLO: Final = struct.Struct("<4s16s")
_CALL: Final = struct.Struct("<B?6xQQ")
_PROGRESS: Final = struct.Struct("<Q")
_ANSWER: Final = struct.Struct("<H6x")
_CALL_FRAME: Final = struct.Struct("<B3xIB?6xQQ")
_ANSWER_FRAME: Final = struct.Struct("<B3xIH6x")
_STRIPED_CALL: Final = struct.Struct("<BB6xQ16s")
_STRIPE: Final = struct.Struct("<16s")
_PIECE: Final = struct.Struct("<Q")


class FrameKind(IntEnum):
    """The kind of a frame.

    OVERLAPPED_CALL, STREAM_CALL and FETCH_CALL are never sent: on the wire each is a CALL, whose payload says which of
    them it is. The number 5 belonged to a kind that is no longer sent.
    """

    HELLO = 1
    CALL = 2
    MESSAGE = 3
    ELEMENTS = 4
    END = 6
    FAILED = 7
    PROGRESS = 8
    ANSWER = 9
    OVERLAPPED_CALL = 10
    STREAM_CALL = 11
    FETCH_CALL = 12
    STRIPED_CALL = 13
    STRIPE = 14
    PIECE = 15
    PACKED_ELEMENTS = 16


class MethodCode(IntEnum):
    """The number of a method on the wire. The names are those of the service."""

    Deconvolve = 1
    DeconvolveGrad = 2
    DeconvolveStream = 3
    DeconvolveGradStream = 4
    PutTensor = 5
    GetTensor = 6


_CALL_KINDS: Final = {
    MethodCode.Deconvolve: FrameKind.CALL,
    MethodCode.DeconvolveGrad: FrameKind.CALL,
    MethodCode.DeconvolveStream: FrameKind.STREAM_CALL,
    MethodCode.DeconvolveGradStream: FrameKind.STREAM_CALL,
    MethodCode.PutTensor: FrameKind.STREAM_CALL,
    MethodCode.GetTensor: FrameKind.FETCH_CALL,
}
"""The kind of a call that is not overlapped. Only methods of kind CALL can be called overlapped."""

_METHODS: Final = {method.value: method for method in MethodCode}


def pack_frame(kind: int, payload: bytes) -> bytes:
    """Return the bytes of a frame. Its kind and size are not checked."""
    return FRAME_HEAD.pack(kind, len(payload)) + payload


class Hello(NamedTuple):
    """The handshake of either end.

    Attributes:
        instance: From a client: the id of the wanted server, or `ANY_INSTANCE`. From a server: its own id.
    """

    instance: bytes

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.HELLO, _HELLO.pack(_MAGIC, self.instance))

    @classmethod
    def parse(cls, payload: bytes) -> Hello:
        """Return the event in a payload. Raises RemoteProtocolError if the payload is of another protocol."""
        magic, instance = _HELLO.unpack(payload)
        if magic != _MAGIC:
            raise RemoteProtocolError("the peer's handshake belongs to another protocol or version")
        return cls(instance)


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
        return FrameKind.OVERLAPPED_CALL if self.is_overlapped else _CALL_KINDS[self.method]

    def pack(self) -> bytes:
        """Return the event's frame."""
        method, timeout_s, message, is_overlapped, written_bytes = self
        timeout_us = max(int(min(timeout_s, _MAX_TIMEOUT_S) * 1e6), 0)
        payload_bytes = _CALL.size + len(message)
        head = _CALL_FRAME.pack(
            FrameKind.CALL, payload_bytes, method, is_overlapped, timeout_us, written_bytes
        )
        return head + message

    @classmethod
    def parse(cls, payload: bytes) -> CallHead:
        """Return the event in a payload. Raises RemoteProtocolError if the method cannot be called so."""
        number, is_overlapped, timeout_us, written_bytes = _CALL.unpack_from(payload)
        method = _METHODS.get(number)
        if method is None:
            raise RemoteProtocolError(f"the peer called an unknown method, number {number}")
        if is_overlapped and _CALL_KINDS[method] is not FrameKind.CALL:
            raise RemoteProtocolError(
                f"the peer made an overlapped call of {method.name}, which cannot be overlapped"
            )
        return cls(method, timeout_us / 1e6, payload[_CALL.size :], is_overlapped, written_bytes)


class StripedCallHead(NamedTuple):
    """The first frame of a striped call, on its control connection.

    Attributes:
        timeout_s: How long the caller waits for the end of the call, in seconds.
        message: The request message.
        transfer: The id by which the stripes join the call: `TRANSFER_ID_BYTES` random bytes.
        stripes_count: How many connections join it, from 1 to `MAX_STRIPES_COUNT`.
    """

    method: MethodCode
    timeout_s: float
    message: bytes
    transfer: bytes
    stripes_count: int

    def pack(self) -> bytes:
        """Return the event's frame."""
        timeout_us = max(int(min(self.timeout_s, _MAX_TIMEOUT_S) * 1e6), 0)
        head = _STRIPED_CALL.pack(self.method, self.stripes_count, timeout_us, self.transfer)
        return pack_frame(FrameKind.STRIPED_CALL, head + self.message)

    @classmethod
    def parse(cls, payload: bytes) -> StripedCallHead:
        """Return the event in a payload. Raises RemoteProtocolError if there can be no such call."""
        number, stripes_count, timeout_us, transfer = _STRIPED_CALL.unpack_from(payload)
        method = _METHODS.get(number)
        if method is None or _CALL_KINDS[method] is not FrameKind.CALL:
            raise RemoteProtocolError(
                f"the peer made a striped call of method number {number}, which cannot be striped"
            )
        if not 1 <= stripes_count <= MAX_STRIPES_COUNT:
            raise RemoteProtocolError(
                f"the peer made a call of {stripes_count} stripes, where from 1 to {MAX_STRIPES_COUNT} are allowed"
            )
        return cls(method, timeout_us / 1e6, payload[_STRIPED_CALL.size :], transfer, stripes_count)


class StripeHead(NamedTuple):
    """The first frame of a stripe: its connection joins a striped call.

    Attributes:
        transfer: That of the call. See `StripedCallHead`.
    """

    transfer: bytes

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.STRIPE, _STRIPE.pack(self.transfer))

    @classmethod
    def parse(cls, payload: bytes) -> StripeHead:
        """Return the event in a payload."""
        return cls(*_STRIPE.unpack(payload))


class PieceHead(NamedTuple):
    """The head of a piece, whose elements follow. See `deconvd.direct.pieces`."""

    number: int

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.PIECE, _PIECE.pack(self.number))

    @classmethod
    def parse(cls, payload: bytes) -> PieceHead:
        """Return the event in a payload."""
        return cls(*_PIECE.unpack(payload))


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
    """

    message: bytes
    ledger: str

    def pack(self) -> bytes:
        """Return the event's frame."""
        message, ledger = self.message, self.ledger.encode()
        payload_bytes = _ANSWER.size + len(ledger) + len(message)
        head = _ANSWER_FRAME.pack(FrameKind.ANSWER, payload_bytes, len(ledger))
        return b"".join((head, ledger, message))

    @classmethod
    def parse(cls, payload: bytes) -> Answer:
        """Return the event in a payload. Raises RemoteProtocolError if the payload ends inside the ledger."""
        (ledger_bytes,) = _ANSWER.unpack_from(payload)
        end = _ANSWER.size + ledger_bytes
        if len(payload) < end:
            raise RemoteProtocolError(
                f"the peer sent an answer of {len(payload)} bytes, whose ledger alone ends at byte {end}"
            )
        return cls(payload[end:], payload[_ANSWER.size : end].decode("ascii", errors="replace"))


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
    FrameKind.HELLO: range(_HELLO.size, _HELLO.size + 1),
    FrameKind.CALL: range(_CALL.size, MAX_MESSAGE_BYTES + 1),
    FrameKind.MESSAGE: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.ELEMENTS: range(1 << 32),
    FrameKind.PACKED_ELEMENTS: range(MIN_PACKED_BYTES, MAX_PACKED_BYTES + 1),
    FrameKind.END: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.FAILED: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.PROGRESS: range(_PROGRESS.size, _PROGRESS.size + 1),
    FrameKind.ANSWER: range(_ANSWER.size, MAX_MESSAGE_BYTES + 1),
    FrameKind.STRIPED_CALL: range(_STRIPED_CALL.size, MAX_MESSAGE_BYTES + 1),
    FrameKind.STRIPE: range(_STRIPE.size, _STRIPE.size + 1),
    FrameKind.PIECE: range(_PIECE.size, _PIECE.size + 1),
}
"""The sizes that a payload may have, in bytes, by the kind of frame on the wire."""
