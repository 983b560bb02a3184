"""The lending protocol: how a client borrows shared memory from a server on the same host.

The server listens on Unix sockets of type SOCK_SEQPACKET, which GetServerInfo names. Each packet from the client is one
request, and the server answers it with one packet. A client sends its next request after it has received the reply. All
numbers are little-endian.

    request   "dcm1", operation (1 byte), 3 zero bytes, size in bytes (8 bytes), region (16 bytes)
    reply     "dcm1", status (1 byte), 3 zero bytes, size in bytes (8 bytes), region (16 bytes), text (UTF-8)

A reply to LEND with the status DONE carries, by SCM_RIGHTS, the descriptor of a memfd of that size. It is sealed
against growing, shrinking and further seals. The text of a reply to LEND_ON_CARD with the status DONE is the
cudaIpcMemHandle_t of memory on that card, in hexadecimal digits. That memory is zeroed, has at least the requested
size, and gives access to no other memory. Before a client puts anything into memory, it MUST verify the server with
IDENTIFY: the path may belong to another server. Everyone who knows a region's name can name slices of it in calls, so
a client MUST keep the name secret.

A region is lent until the client returns it, or closes the socket, also by dying. The client can still read and write
a region of host memory after that; it counts as lent until no process has a descriptor or a mapping of it. CUDA frees
memory on a card only after every other process has closed it. So a client MUST close such a region before it returns
it. If it closes the socket without that, the server keeps the memory until the client's process ends.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = [
    "FIRST_REGION_BYTES",
    "MAX_REPLY_BYTES",
    "REGION_NAME_BYTES",
    "LendingOperation",
    "LendingReply",
    "LendingRequest",
    "ReplyStatus",
    "card_id",
]

FIRST_REGION_BYTES: Final = 64 << 20
"""Size of the first region that a client borrows, unless it needs a larger one. A server may keep one ready."""

REGION_NAME_BYTES: Final = 16
MAX_REPLY_BYTES: Final = 1024

_MAGIC: Final = b"dcm1"
_FORMAT: Final = struct.Struct(f"<4sB3xQ{REGION_NAME_BYTES}s")
_NO_REGION: Final = bytes(REGION_NAME_BYTES)


class LendingOperation(IntEnum):
    """What a client requests."""

    LEND = 1
    """Lend a new region of the given size."""

    RETURN = 2
    """Take a region back: no later call may use it. The size is ignored."""

    LEND_ON_CARD = 3
    """Lend a new region of the given size on a card. The request's region is the `card_id`."""

    IDENTIFY = 4
    """Say which instance the server is. The reply's region is the instance id."""


class ReplyStatus(IntEnum):
    """The outcome of a request."""

    DONE = 0
    OVER_CLIENT_LIMIT = 1
    """This client has borrowed as much as one client may. It can return something and try again."""

    OVER_SERVER_LIMIT = 2
    """All clients together have borrowed as much as the server lends. A later request may succeed."""

    REFUSED = 3
    """The server does not lend to this user, or to no more clients. It closes the socket."""

    MALFORMED = 4
    """The request is malformed. The server closes the socket."""

    FAILED = 5
    """The server could not allocate the memory."""

    NO_SUCH_CARD = 6
    """The server cannot lend memory of that card to this client, now or later."""


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
        """Return the request in a packet. Raises ValueError if the packet is malformed."""
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
        """Return the packet. A text that is too long for it is cut."""
        packet = _FORMAT.pack(_MAGIC, self.status, self.size_bytes, self.region)
        return (packet + self.text.encode())[:MAX_REPLY_BYTES]

    @classmethod
    def parse(cls, packet: bytes) -> LendingReply:
        """Return the reply in a packet. Raises ValueError if the packet is malformed."""
        status, size_bytes, region = _unpack_packet(packet, exact=False)
        text = packet[_FORMAT.size :].decode(errors="replace")
        return cls(ReplyStatus(status), size_bytes, region, text)


def card_id(uuid: bytes) -> bytes:
    """Return the id by which both ends name a card, from the UUID that CuPy reports.

    CuPy reads the UUID's 16 bytes as a C string. So its value ends at the first zero byte, or, without one, includes
    arbitrary bytes from behind the UUID. The id uses only the part that is correct, which is the same in each process.
    """
    return uuid[:REGION_NAME_BYTES].ljust(REGION_NAME_BYTES, b"\0")


def _unpack_packet(packet: bytes, *, exact: bool) -> tuple[int, int, bytes]:
    if len(packet) < _FORMAT.size or (exact and len(packet) != _FORMAT.size):
        raise ValueError(
            f"a packet must have {'' if exact else 'at least '}{_FORMAT.size} bytes, got {len(packet)}"
        )
    magic, code, size_bytes, region = _FORMAT.unpack_from(packet)
    if magic != _MAGIC:
        raise ValueError(f"a packet must begin with {_MAGIC!r}, got {magic!r}")
    return code, size_bytes, region
