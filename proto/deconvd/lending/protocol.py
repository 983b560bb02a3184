"""How client and server agree on memory that both have: what crosses the side socket.

The server listens on Unix sockets of type SOCK_SEQPACKET, which GetServerInfo tells. Each packet from the client is one
request, answered by one packet; a client sends the next request once it has the answer. All numbers are little-endian.

    request   "dcm1", operation (1 byte), 3 zero bytes, size in bytes (8 bytes), region (16 bytes)
    reply     "dcm1", answer (1 byte), 3 zero bytes, size in bytes (8 bytes), region (16 bytes), text (UTF-8)

A reply to LEND with the answer DONE carries the descriptor of a memfd of that size, sealed against growing, shrinking
and further seals, by SCM_RIGHTS. A reply to LEND_ON_CARD with the answer DONE has in its text the cudaIpcMemHandle_t of
memory on that card, in hexadecimal digits: all zeros at first, of at least the size asked for, and nothing else can be
reached by it. A client asks who is there (IDENTIFY) before it puts anything into memory: the path may be another
server's. Whoever knows a region's name may name slices of it in calls: it is a secret of the client.

Everything is lent until the client gives it back or closes the socket, be it by dying. A region of the host's memory
stays the client's to read and write then, and counts as lent until no process has a descriptor or a mapping of it. CUDA
has memory freed only once no other process has it open. So a client MUST close what it opened before it gives the
region back; and memory on cards that a client has when it closes the socket is kept until its process ends.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = [
    "MAX_REPLY_BYTES",
    "REGION_NAME_BYTES",
    "LendingOperation",
    "LendingReply",
    "LendingRequest",
    "ReplyStatus",
    "card_id",
]

REGION_NAME_BYTES: Final = 16
MAX_REPLY_BYTES: Final = 1024

_MAGIC: Final = b"dcm1"
_FORMAT: Final = struct.Struct(f"<4sB3xQ{REGION_NAME_BYTES}s")
_NO_REGION: Final = bytes(REGION_NAME_BYTES)


class LendingOperation(IntEnum):
    """What a client asks for."""

    LEND = 1
    """A new region of the given size."""

    RETURN = 2
    """To take a region back: no later call may use it. The size is not looked at."""

    LEND_ON_CARD = 3
    """A new region of the given size on the card whose `card_id` stands in place of a region."""

    IDENTIFY = 4
    """Which instance the server is: the reply has its id in place of a region."""


class ReplyStatus(IntEnum):
    """What came of a request."""

    DONE = 0
    OVER_CLIENT_LIMIT = 1
    """This client has as much as one client may have. It can give something back and ask again."""

    OVER_SERVER_LIMIT = 2
    """All clients together have as much as the server lends. Later there may be more."""

    REFUSED = 3
    """The server lends to other users only, or to no more clients; it closes the socket."""

    MALFORMED = 4
    """The request makes no sense; the server closes the socket."""

    FAILED = 5
    """The server could not get the memory from its system."""

    NO_SUCH_CARD = 6
    """The server lends no memory of that card to this client, and never will."""


@dataclass(frozen=True, slots=True)
class LendingRequest:
    """A packet from client to server."""

    operation: LendingOperation
    size_bytes: int = 0
    region: bytes = _NO_REGION

    def pack(self) -> bytes:
        """Return the packet."""
        return _FORMAT.pack(_MAGIC, self.operation, self.size_bytes, self.region)

    @classmethod
    def parse(cls, packet: bytes) -> LendingRequest:
        """Return the request in a packet. Raises ValueError if there is none."""
        operation, size_bytes, region = _unpack_packet(packet, exact=True)
        return cls(LendingOperation(operation), size_bytes, region)


@dataclass(frozen=True, slots=True)
class LendingReply:
    """A packet from server to client."""

    status: ReplyStatus
    size_bytes: int = 0
    region: bytes = _NO_REGION
    text: str = ""

    def pack(self) -> bytes:
        """Return the packet; a text that is too long for it is cut."""
        packet = _FORMAT.pack(_MAGIC, self.status, self.size_bytes, self.region)
        return (packet + self.text.encode())[:MAX_REPLY_BYTES]

    @classmethod
    def parse(cls, packet: bytes) -> LendingReply:
        """Return the reply in a packet. Raises ValueError if there is none."""
        answer, size_bytes, region = _unpack_packet(packet, exact=False)
        text = packet[_FORMAT.size :].decode(errors="replace")
        return cls(ReplyStatus(answer), size_bytes, region, text)


def card_id(uuid: bytes) -> bytes:
    """Return what both ends call a card, given its UUID as CuPy tells it.

    CuPy takes the UUID's 16 bytes for a C string: it ends at the first zero, and where there is none
    it goes on into whatever lies behind. What it has right is the same in each process.
    """
    return uuid[:REGION_NAME_BYTES].ljust(REGION_NAME_BYTES, b"\0")


def _unpack_packet(packet: bytes, *, exact: bool) -> tuple[int, int, bytes]:
    if len(packet) < _FORMAT.size or (exact and len(packet) != _FORMAT.size):
        raise ValueError(f"a packet of {len(packet)} bytes, of which {_FORMAT.size} are expected")
    magic, code, size_bytes, region = _FORMAT.unpack_from(packet)
    if magic != _MAGIC:
        raise ValueError("the packet is of another protocol")
    return code, size_bytes, region
