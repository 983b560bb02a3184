"""What the two ends of a line say to each other, and how it is written: events to frames, and back. Pure.

A frame is a kind (1 byte), 3 zero bytes, the length of its payload (4 bytes) and the payload. The messages are those of
the service. All numbers are little-endian. What may be said when is written in `deconvd.direct.protocol`.

    client   HELLO              "dcd5", and the id of the instance that is meant (16 bytes; zeros for any): once
             CALL               method (1 byte), whether it is early (1 byte: 0 or 1), 6 zero bytes, timeout in
                                microseconds (8 bytes), how many bytes are written (8 bytes), the request's message
             WRITTEN            in an early call: how many bytes are written by now (8 bytes)
             ELEMENTS           for a method that streams its request: the next elements, as in Tensor.raw; not empty
             MISSING_ELEMENTS   the next elements of what the server found missing; not empty
             END                for such a method: the request is whole

    server   HELLO              "dcd5", and its own id: once
             ANSWER             a call of a method that streams nothing has ended well: how many bytes the ledger has
                                (2 bytes), 6 zero bytes, the ledger (ASCII; as in `deconvd.wire.ledger`), the response
             MESSAGE            of another method: the response, or a message of it
             ELEMENTS           the next elements; not empty
             END                a call of such a method has ended well: the ledger
             FAILED             the call has failed: a google.rpc.Status
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias

from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from deconvd.direct.connection_errors import RemoteProtocolError

__all__ = [
    "ANY_INSTANCE",
    "EVENT_PARSERS",
    "FRAME_HEAD",
    "FRAME_HEAD_BYTES",
    "FRAME_KINDS",
    "MAX_MESSAGE_BYTES",
    "PAYLOAD_SIZES",
    "Answer",
    "CallFailure",
    "CallHead",
    "EndOfStream",
    "Event",
    "FrameKind",
    "Hello",
    "MessagePart",
    "MethodCode",
    "ProgressReport",
    "pack_frame",
]

ANY_INSTANCE: Final = bytes(16)
"""Stands for the id of whichever server it is."""

MAX_MESSAGE_BYTES: Final = 128 << 10
"""The largest payload that is no elements: what either end must hold for each line."""

FRAME_HEAD: Final = struct.Struct("<B3xI")
"""A frame's kind, and how many bytes its payload has."""

FRAME_HEAD_BYTES: Final = FRAME_HEAD.size

_MAX_TIMEOUT_S: Final = 1e12
"""Some 30,000 years: what a timeout is at most on the line, where it has 64 bits for its microseconds."""

_MAGIC: Final = b"dcd5"
_HELLO: Final = struct.Struct("<4s16s")
_CALL: Final = struct.Struct("<B?6xQQ")
_PROGRESS: Final = struct.Struct("<Q")
_ANSWER: Final = struct.Struct("<H6x")
_CALL_FRAME: Final = struct.Struct("<B3xIB?6xQQ")
_ANSWER_FRAME: Final = struct.Struct("<B3xIH6x")


class FrameKind(IntEnum):
    """What a frame carries. The last three are CALL on the line: what the call says tells them apart."""

    HELLO = 1
    CALL = 2
    MESSAGE = 3
    ELEMENTS = 4
    MISSING_ELEMENTS = 5
    END = 6
    FAILED = 7
    PROGRESS = 8
    ANSWER = 9
    OVERLAPPED_CALL = 10
    STREAM_CALL = 11
    FETCH_CALL = 12


class MethodCode(IntEnum):
    """A method of the service, by its name there."""

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
"""What the call of a method is, if it is not early. One that can be early is answered by a message."""

_METHODS: Final = {method.value: method for method in MethodCode}


def pack_frame(kind: int, payload: bytes) -> bytes:
    """Return a frame, whether or not it makes sense."""
    return FRAME_HEAD.pack(kind, len(payload)) + payload


class Hello(NamedTuple):
    """The greeting.

    Attributes:
        instance: The id of the server that is meant, or that says it; `ANY_INSTANCE` for any.
    """

    instance: bytes

    def pack(self) -> bytes:
        """Return its frame."""
        return pack_frame(FrameKind.HELLO, _HELLO.pack(_MAGIC, self.instance))

    @classmethod
    def parse(cls, payload: bytes) -> Hello:
        """Return what a frame's payload says. Raises RemoteProtocolError if it is no greeting."""
        magic, instance = _HELLO.unpack(payload)
        if magic != _MAGIC:
            raise RemoteProtocolError("a greeting of another protocol")
        return cls(instance)


class CallHead(NamedTuple):
    """How a call begins.

    Attributes:
        timeout_s: Seconds that the caller waits.
        message: The request, or its first message.
        is_early: Whether operands are still being written.
        written_bytes: How far they are.
    """

    method: MethodCode
    timeout_s: float
    message: bytes
    is_overlapped: bool = False
    written_bytes: int = 0

    @property
    def kind(self) -> FrameKind:
        """Which kind of call it is."""
        return FrameKind.OVERLAPPED_CALL if self.is_overlapped else _CALL_KINDS[self.method]

    def pack(self) -> bytes:
        """Return its frame."""
        method, timeout_s, message, is_early, written_bytes = self
        timeout_us = max(int(min(timeout_s, _MAX_TIMEOUT_S) * 1e6), 0)
        payload_bytes = _CALL.size + len(message)
        head = _CALL_FRAME.pack(
            FrameKind.CALL, payload_bytes, method, is_early, timeout_us, written_bytes
        )
        return head + message

    @classmethod
    def parse(cls, payload: bytes) -> CallHead:
        """Return what a frame's payload says. Raises RemoteProtocolError if it is no call."""
        number, is_early, timeout_us, written_bytes = _CALL.unpack_from(payload)
        method = _METHODS.get(number)
        if method is None:
            raise RemoteProtocolError(f"a call of the unknown method {number}")
        if is_early and _CALL_KINDS[method] is not FrameKind.CALL:
            raise RemoteProtocolError(f"an early call of {method.name}")
        return cls(method, timeout_us / 1e6, payload[_CALL.size :], is_early, written_bytes)


class ProgressReport(NamedTuple):
    """How many bytes of an early call's operands are written."""

    written_bytes: int

    def pack(self) -> bytes:
        """Return its frame."""
        return pack_frame(FrameKind.PROGRESS, _PROGRESS.pack(self.written_bytes))

    @classmethod
    def parse(cls, payload: bytes) -> ProgressReport:
        """Return what a frame's payload says."""
        return cls(*_PROGRESS.unpack(payload))


class MessagePart(NamedTuple):
    """The response of a method that has parts, or a message of it."""

    data: bytes

    def pack(self) -> bytes:
        """Return its frame."""
        return pack_frame(FrameKind.MESSAGE, self.data)


class EndOfStream(NamedTuple):
    """A request or a response in parts is whole.

    Attributes:
        ledger: What comes with a response.
    """

    ledger: str = ""

    def pack(self) -> bytes:
        """Return its frame."""
        return pack_frame(FrameKind.END, self.ledger.encode())

    @classmethod
    def parse(cls, payload: bytes) -> EndOfStream:
        """Return what a frame's payload says."""
        return cls(payload.decode("ascii", errors="replace"))


class Answer(NamedTuple):
    """The response to a call that streams nothing.

    Attributes:
        message: The response.
        ledger: What came with it.
    """

    message: bytes
    ledger: str

    def pack(self) -> bytes:
        """Return its frame."""
        message, ledger = self.message, self.ledger.encode()
        payload_bytes = _ANSWER.size + len(ledger) + len(message)
        head = _ANSWER_FRAME.pack(FrameKind.ANSWER, payload_bytes, len(ledger))
        return b"".join((head, ledger, message))

    @classmethod
    def parse(cls, payload: bytes) -> Answer:
        """Return what a frame's payload says. Raises RemoteProtocolError if it is no answer."""
        (ledger_bytes,) = _ANSWER.unpack_from(payload)
        end = _ANSWER.size + ledger_bytes
        if len(payload) < end:
            raise RemoteProtocolError(f"an answer of {len(payload)} bytes, which is none")
        return cls(payload[end:], payload[_ANSWER.size : end].decode("ascii", errors="replace"))


class CallFailure(NamedTuple):
    """The call has failed."""

    status: status_pb2.Status

    def pack(self) -> bytes:
        """Return its frame."""
        return pack_frame(FrameKind.FAILED, self.status.SerializeToString())

    @classmethod
    def parse(cls, payload: bytes) -> CallFailure:
        """Return what a frame's payload says. Raises RemoteProtocolError if it is no status."""
        try:
            return cls(status_pb2.Status.FromString(payload))
        except DecodeError:
            raise RemoteProtocolError("a failure that is no google.rpc.Status") from None


Event: TypeAlias = (
    Hello | CallHead | ProgressReport | MessagePart | EndOfStream | Answer | CallFailure
)
"""What either end says in one frame. Elements are beside these: see `DirectProtocol`."""

FRAME_KINDS: Final[Mapping[type[Event], FrameKind]] = {
    Hello: FrameKind.HELLO,
    MessagePart: FrameKind.MESSAGE,
    EndOfStream: FrameKind.END,
    CallFailure: FrameKind.FAILED,
    ProgressReport: FrameKind.PROGRESS,
    Answer: FrameKind.ANSWER,
}
"""Those of all events but calls, which have several."""

EVENT_PARSERS: Final[Mapping[int, Callable[[bytes], Event]]] = {
    FrameKind.HELLO: Hello.parse,
    FrameKind.CALL: CallHead.parse,
    FrameKind.MESSAGE: MessagePart,
    FrameKind.END: EndOfStream.parse,
    FrameKind.FAILED: CallFailure.parse,
    FrameKind.PROGRESS: ProgressReport.parse,
    FrameKind.ANSWER: Answer.parse,
}

PAYLOAD_SIZES: Final[Mapping[int, range]] = {
    FrameKind.HELLO: range(_HELLO.size, _HELLO.size + 1),
    FrameKind.CALL: range(_CALL.size, MAX_MESSAGE_BYTES + 1),
    FrameKind.MESSAGE: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.ELEMENTS: range(1 << 32),
    FrameKind.MISSING_ELEMENTS: range(1 << 32),
    FrameKind.END: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.FAILED: range(MAX_MESSAGE_BYTES + 1),
    FrameKind.PROGRESS: range(_PROGRESS.size, _PROGRESS.size + 1),
    FrameKind.ANSWER: range(_ANSWER.size, MAX_MESSAGE_BYTES + 1),
}
"""How many bytes the payload of a frame may have, by its kind on the line."""
