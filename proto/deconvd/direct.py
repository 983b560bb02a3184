"""Calls between processes of one host, without gRPC: what crosses the socket for direct calls.

A server that listens for gRPC on a Unix socket listens beside it, on one of type SOCK_SEQPACKET. Each packet from the
client is one call, answered by one packet; a client makes the next call on the same socket once it has the answer. The
messages are those of the service. All numbers are little-endian.

    request   "dcd1", method (1 byte), 3 zero bytes, timeout in microseconds (8 bytes), the request's message
    reply     "dcd1", outcome (1 byte), 3 zero bytes, length of the ledger in bytes (4 bytes), 4 zero bytes,
              the ledger (ASCII; as in `deconvd.ledger`), the response's message or a google.rpc.Status

A client that closes the socket gives its call up. A server that closes it has not begun the call, or cannot say what
came of it: the client makes it again by gRPC. So it does with what has no room in a packet.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = ["MAX_PACKET_BYTES", "Method", "Outcome", "Reply", "Request", "calls_beside"]

MAX_PACKET_BYTES: Final = 128 << 10
"""What every Linux takes in a packet without being asked for more: its buffers have 208 KiB."""

_MAGIC: Final = b"dcd1"
_REQUEST: Final = struct.Struct("<4sB3xQ")
_REPLY: Final = struct.Struct("<4sB3xI4x")


class Method(IntEnum):
    """A method of the service."""

    DECONVOLVE = 1
    DECONVOLVE_GRAD = 2


class Outcome(IntEnum):
    """What came of a call."""

    ANSWERED = 0
    FAILED = 1


@dataclass(frozen=True, slots=True)
class Request:
    """A packet from client to server.

    Attributes:
        timeout_s: Seconds that the caller waits.
    """

    method: Method
    timeout_s: float
    message: bytes

    def pack(self) -> bytes:
        """Return the packet."""
        header = _REQUEST.pack(_MAGIC, self.method, max(int(self.timeout_s * 1e6), 0))
        return header + self.message

    @classmethod
    def parse(cls, packet: bytes) -> Request:
        """Return the request in a packet. Raises ValueError if there is none."""
        _check(packet, _REQUEST)
        _, method, timeout_us = _REQUEST.unpack_from(packet)
        return cls(Method(method), timeout_us / 1e6, packet[_REQUEST.size :])


@dataclass(frozen=True, slots=True)
class Reply:
    """A packet from server to client.

    Attributes:
        message: The response, or the status of a call that failed.
    """

    outcome: Outcome
    ledger: str
    message: bytes

    def pack(self) -> bytes:
        """Return the packet."""
        ledger = self.ledger.encode()
        return _REPLY.pack(_MAGIC, self.outcome, len(ledger)) + ledger + self.message

    @classmethod
    def parse(cls, packet: bytes) -> Reply:
        """Return the reply in a packet. Raises ValueError if there is none."""
        _check(packet, _REPLY)
        _, outcome, ledger_bytes = _REPLY.unpack_from(packet)
        end = _REPLY.size + ledger_bytes
        return cls(Outcome(outcome), packet[_REPLY.size : end].decode(), packet[end:])


def calls_beside(unix_path: str) -> str:
    """Return the path of the socket for direct calls of a server whose gRPC socket is `unix_path`."""
    return f"{unix_path}.calls"


def _check(packet: bytes, header: struct.Struct) -> None:
    if len(packet) < header.size or not packet.startswith(_MAGIC):
        raise ValueError(f"a packet of {len(packet)} bytes that is of another protocol")
