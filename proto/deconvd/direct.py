"""Direct calls: the service's methods without gRPC, on lines of their own, for ends that both know this.

A server that listens for gRPC listens for direct calls too: on a Unix socket beside each of its own, and on a TCP port.
GetServerInfo tells which. A line is a connection to one of them: it carries one call after the other, in frames (see
`deconvd.line`). The messages are those of the service. All numbers are little-endian.

    client   HELLO              "dcd5", and the id of the instance that is meant (16 bytes; zeros for any): once
             CALL               method (1 byte), whether it is early (1 byte: 0 or 1), 6 zero bytes, timeout in
                                microseconds (8 bytes), how many bytes are written (8 bytes), the request's message
             WRITTEN            in an early call: how many bytes are written by now (8 bytes)
             ELEMENTS           for a method that streams its request: the next elements, as in Tensor.raw
             MISSING_ELEMENTS   the next elements of what the server found missing
             END                for such a method: the request is whole

    server   HELLO              "dcd5", and its own id: once
             ANSWER             a call of a method that streams nothing has ended well: how many bytes the ledger has
                                (2 bytes), 6 zero bytes, the ledger (ASCII; as in `deconvd.ledger`), the response
             MESSAGE            of another method: the response, or a message of it
             ELEMENTS           the next elements
             END                a call of such a method has ended well: the ledger
             FAILED             the call has failed: a google.rpc.Status

A call of Deconvolve or DeconvolveGrad may be early: its client is still writing the operands that are in shared memory,
in the order W, b, gy, x, each from its begin to its end, and says now and then how far it has come, and at last that
all are written. Thus they can be uploaded while they are being written. A server need not wait for the rest to answer:
what is said after that it passes over.

Both send at once; the order is that of the stream. A client waits for the greeting before its first call, so as not to
call a stranger at the port. A frame that is only the other end's to send breaks the line. A client that closes it gives
its call up. A server that closes it has not begun the call, or cannot say what came of it: the client makes it again by
gRPC. A server closes a line that means another instance, and after a call that failed before its request was whole, and
MAY close one between calls.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from enum import IntEnum
from typing import ClassVar, Final, NamedTuple

from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from deconvd.line import FRAME_HEAD_BYTES, FrameKind, Line, LineBrokenError
from deconvd.parts import Ahead, Bytes, parsed
from deconvd.status import error_from_status

__all__ = [
    "ANY_INSTANCE",
    "EARLY_ORDER",
    "Answer",
    "CallHead",
    "FrameSource",
    "Method",
    "RequestSource",
    "be_greeted",
    "ended",
    "failure",
    "greet",
    "hear_written",
    "tell_written",
]

ANY_INSTANCE: Final = bytes(16)
"""Stands for the id of whichever server it is."""

_MAGIC: Final = b"dcd5"
_HELLO: Final = struct.Struct("<4s16s")
_CALL: Final = struct.Struct("<B?6xQQ")
_WRITTEN: Final = struct.Struct("<Q")
_ANSWER: Final = struct.Struct("<H6x")

_ELEMENTS: Final = (FrameKind.ELEMENTS, FrameKind.MISSING_ELEMENTS)


class Method(IntEnum):
    """A method of the service, by its name there."""

    Deconvolve = 1
    DeconvolveGrad = 2
    DeconvolveStream = 3
    DeconvolveGradStream = 4
    PutTensor = 5
    GetTensor = 6

    @property
    def streams_request(self) -> bool:
        """Whether its request has parts beyond the first message, and an end."""
        return self in (Method.DeconvolveStream, Method.DeconvolveGradStream, Method.PutTensor)


_METHODS: Final = {method.value: method for method in Method}
_EARLY: Final = (Method.Deconvolve, Method.DeconvolveGrad)

EARLY_ORDER: Final = ("w", "b", "gy", "x")
"""The order in which operands of an early call are written, by their fields."""


class CallHead(NamedTuple):
    """How a call begins.

    Attributes:
        timeout_s: Seconds that the caller waits.
        message: The request, or its first message.
        is_early: Whether operands are still being written.
        written_bytes: How far they are.
    """

    method: Method
    timeout_s: float
    message: bytes
    is_early: bool = False
    written_bytes: int = 0

    def pack(self) -> bytes:
        """Return the payload of its frame."""
        timeout_us = max(int(self.timeout_s * 1e6), 0)
        head = _CALL.pack(self.method, self.is_early, timeout_us, self.written_bytes)
        return head + self.message

    @classmethod
    def parse(cls, payload: bytes) -> CallHead:
        """Return what a frame's payload says. Raises LineBrokenError if it is no call."""
        if len(payload) < _CALL.size:
            raise LineBrokenError(f"a call of {len(payload)} bytes, which is none")
        number, is_early, timeout_us, written_bytes = _CALL.unpack_from(payload)
        method = _METHODS.get(number)
        if method is None:
            raise LineBrokenError(f"a call of the unknown method {number}")
        if is_early and method not in _EARLY:
            raise LineBrokenError(f"an early call of {method.name}")
        return cls(method, timeout_us / 1e6, payload[_CALL.size :], is_early, written_bytes)


class Answer(NamedTuple):
    """The response to a call that streams nothing.

    Attributes:
        message: The response.
        ledger: What came with it.
    """

    message: bytes
    ledger: str

    def pack(self) -> bytes:
        """Return the payload of its frame."""
        ledger = self.ledger.encode()
        return b"".join((_ANSWER.pack(len(ledger)), ledger, self.message))

    @classmethod
    def parse(cls, payload: bytes) -> Answer:
        """Return what a frame's payload says. Raises LineBrokenError if it is no answer."""
        begin = end = _ANSWER.size
        if len(payload) >= begin:
            end += _ANSWER.unpack_from(payload)[0]
        if len(payload) < end:
            raise LineBrokenError(f"an answer of {len(payload)} bytes, which is none")
        return cls(payload[end:], _text(payload[begin:end]))


def tell_written(line: Line, size_bytes: int) -> None:
    """Say how many bytes of an early call's operands are written."""
    line.send((FrameKind.WRITTEN, _WRITTEN.pack(size_bytes)))


def hear_written(line: Line, timeout_s: float) -> int | None:
    """Return how many bytes of an early call's operands are written, as the client says next.

    None if it does not say so within so many seconds.

    Raises:
        LineBrokenError: It says something else, or goes.
    """
    if not line.has_come(FRAME_HEAD_BYTES + _WRITTEN.size, timeout_s):
        return None
    kind, size_bytes = line.receive()
    if kind is not FrameKind.WRITTEN or size_bytes != _WRITTEN.size:
        raise LineBrokenError(
            f"{kind.name} of {size_bytes} bytes while operands were being written"
        )
    (written_bytes,) = _WRITTEN.unpack(line.receive_payload(size_bytes))
    return int(written_bytes)


def greet(line: Line, instance: bytes) -> None:
    """Say who is meant at the other end of a new line, and wait for it to say that it is.

    Raises:
        LineBrokenError: It is another, or says nothing.
    """
    _say_hello(line, instance)
    _hear_hello(line, instance)


def be_greeted(line: Line, instance: bytes) -> None:
    """Wait for a new line's client to say who it means, and say that it is right.

    Raises:
        LineBrokenError: It means another, or is no such client.
    """
    _hear_hello(line, instance)
    _say_hello(line, instance)


def _say_hello(line: Line, instance: bytes) -> None:
    line.send((FrameKind.HELLO, _HELLO.pack(_MAGIC, instance)))


def _hear_hello(line: Line, instance: bytes) -> None:
    kind, size_bytes = line.receive()
    if kind is not FrameKind.HELLO or size_bytes != _HELLO.size:
        raise LineBrokenError(f"{kind.name} of {size_bytes} bytes where there was to be a greeting")
    magic, meant = _HELLO.unpack(line.receive_payload(size_bytes))
    if magic != _MAGIC or not (meant == instance or ANY_INSTANCE in (meant, instance)):
        raise LineBrokenError("a greeting from or to another server")


class FrameSource:
    """The parts of a response that a line's frames carry. See `deconvd.parts.PartSource`.

    It raises what a server says that a call failed with, and as `Line` does.

    Attributes:
        is_over: Whether the last of them has come.
        ledger: What came with it.
        kinds: Kinds of frames that may come.

    Args:
        part_type: The type of the stream's messages.
        first: The first of them, if it has come already.
    """

    kinds: ClassVar[Collection[FrameKind]] = (
        FrameKind.MESSAGE,
        FrameKind.ELEMENTS,
        FrameKind.END,
        FrameKind.FAILED,
    )

    def __init__(self, line: Line, part_type: type[Message], first: bytes | None = None) -> None:
        self._line = line
        self._part_type = part_type
        self._first = first
        self.is_over = False
        self.ledger = ""

    def next(self) -> Message | Ahead | None:
        """Return the next part; None at the end."""
        if self._first is not None:
            first, self._first = self._first, None
            return parsed(self._part_type, first)
        if self.is_over:
            return None
        kind, size_bytes = self._line.receive()
        if kind not in self.kinds:
            raise LineBrokenError(f"{kind.name} in the middle of a call")
        if kind in _ELEMENTS:
            return Ahead(size_bytes, is_missing=kind is FrameKind.MISSING_ELEMENTS)
        payload = self._line.receive_payload(size_bytes)
        if kind is FrameKind.MESSAGE:
            return parsed(self._part_type, payload)
        self.is_over = True
        self.ledger = ended(kind, payload)
        return None

    def read_into(self, target: Bytes) -> None:
        """Read the next of the elements ahead."""
        self._line.read_into(target)


class RequestSource(FrameSource):
    """The parts of a request: all but the first are elements."""

    kinds = (FrameKind.ELEMENTS, FrameKind.MISSING_ELEMENTS, FrameKind.END)


def ended(kind: FrameKind, payload: bytes) -> str:
    """Return the ledger of a call that has ended. Raises what it has failed with, if it has."""
    if kind is FrameKind.FAILED:
        raise failure(payload)
    return _text(payload)


def failure(payload: bytes) -> Exception:
    """Return what a call has failed with. Raises LineBrokenError if the payload does not say it."""
    try:
        return error_from_status(status_pb2.Status.FromString(payload))
    except DecodeError:
        raise LineBrokenError("a failure that is no google.rpc.Status") from None


def _text(ledger: bytes) -> str:
    return ledger.decode("ascii", errors="replace")
