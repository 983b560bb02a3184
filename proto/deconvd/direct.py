"""Direct calls: the service's methods without gRPC, on lines of their own, for ends that both know this.

A server that listens for gRPC listens for direct calls too: on a Unix socket beside its own, and on a TCP port that
GetServerInfo tells. A line is a connection to one of them: it carries one call after the other, in frames (see
`deconvd.line`). The messages are those of the service. All numbers are little-endian.

    client   CALL               "dcd2", method (1 byte), 3 zero bytes, timeout in microseconds (8 bytes), the server's
                                instance id (16 bytes; zeros for whichever server), then the request's message
             ELEMENTS           for a method that streams its request: the next elements, as in Tensor.raw
             MISSING_ELEMENTS   the next elements of what the server found missing
             END                the request is whole

    server   MESSAGE            the response, or a message of a streamed response
             ELEMENTS           the next elements
             END                the call has ended well: the ledger (ASCII; as in `deconvd.ledger`)
             FAILED             the call has failed: a google.rpc.Status

Both send at once; the order is that of the stream. A client that closes the line gives its call up. A server that
closes it has not begun the call, or cannot say what came of it: the client makes it again by gRPC. A server closes a
line after a call that failed before its request was whole, or that was for another instance, and MAY close one between
calls.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2

from deconvd.line import FrameKind, Line, LineBrokenError
from deconvd.parts import Ahead, Bytes, parsed
from deconvd.status import error_from_status

__all__ = ["ANY_INSTANCE", "CallHead", "FrameSource", "Method", "calls_beside", "ended"]

ANY_INSTANCE: Final = bytes(16)
"""Stands for the id of whichever server it is."""

_MAGIC: Final = b"dcd2"
_CALL: Final = struct.Struct("<4sB3xQ16s")

_ELEMENTS: Final = (FrameKind.ELEMENTS, FrameKind.MISSING_ELEMENTS)


class Method(IntEnum):
    """A method of the service, by its name there."""

    Deconvolve = 1
    DeconvolveGrad = 2
    DeconvolveStream = 3
    DeconvolveGradStream = 4
    PutTensor = 5
    GetTensor = 6


@dataclass(frozen=True, slots=True)
class CallHead:
    """How a call begins.

    Attributes:
        timeout_s: Seconds that the caller waits.
        instance: Id of the server that is meant.
        message: The request, or its first message.
    """

    method: Method
    timeout_s: float
    instance: bytes
    message: bytes

    def pack(self) -> bytes:
        """Return the payload of its frame."""
        timeout_us = max(int(self.timeout_s * 1e6), 0)
        return _CALL.pack(_MAGIC, self.method, timeout_us, self.instance) + self.message

    @classmethod
    def parse(cls, payload: bytes) -> CallHead:
        """Return what a frame's payload says. Raises LineBrokenError if it is no call."""
        if len(payload) < _CALL.size or not payload.startswith(_MAGIC):
            raise LineBrokenError(f"a call of {len(payload)} bytes that is of another protocol")
        _, number, timeout_us, instance = _CALL.unpack_from(payload)
        try:
            method = Method(number)
        except ValueError:
            raise LineBrokenError(f"a call of the unknown method {number}") from None
        return cls(method, timeout_us / 1e6, instance, payload[_CALL.size :])


class FrameSource:
    """The parts of a stream that a line's frames carry. See `deconvd.parts.PartSource`.

    It raises what a server says that a call failed with, and as `Line` does.

    Attributes:
        is_over: Whether the last of them has come.
        ledger: What came with it.

    Args:
        part_type: The type of the stream's messages.
        first: The first of them, if it has come already.
    """

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
        if kind in _ELEMENTS:
            return Ahead(size_bytes, is_missing=kind is FrameKind.MISSING_ELEMENTS)
        payload = self._line.receive_payload(size_bytes)
        if kind is FrameKind.MESSAGE:
            return parsed(self._part_type, payload)
        if kind is FrameKind.CALL:
            raise LineBrokenError("a call begins in the middle of another")
        self.is_over = True
        self.ledger = ended(kind, payload)
        return None

    def read_into(self, target: Bytes) -> None:
        """Read the next of the elements ahead."""
        self._line.read_into(target)


def ended(kind: FrameKind, payload: bytes) -> str:
    """Return the ledger of a call that has ended. Raises what it has failed with, if it has."""
    if kind is FrameKind.FAILED:
        try:
            status = status_pb2.Status.FromString(payload)
        except DecodeError:
            raise LineBrokenError("a failure that is no google.rpc.Status") from None
        raise error_from_status(status)
    return payload.decode("ascii", errors="replace")


def calls_beside(unix_path: str) -> str:
    """Return the path of the socket for direct calls of a server whose gRPC socket is `unix_path`."""
    return f"{unix_path}.calls"
