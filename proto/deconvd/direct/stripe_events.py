"""The events of striped calls: frames to events, and back. See `deconvd.direct.events`. Pure."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from deconvd.direct.connection_errors import RemoteProtocolError
from deconvd.direct.frames import (
    CALL_KINDS,
    MAX_TIMEOUT_S,
    METHODS,
    FrameKind,
    MethodCode,
    pack_frame,
)

__all__ = [
    "MAX_STRIPES_COUNT",
    "PIECE_HEAD_BYTES",
    "STRIPED_CALL_BYTES",
    "STRIPE_HEAD_BYTES",
    "TRANSFER_ID_BYTES",
    "PieceHead",
    "StripeHead",
    "StripedCallHead",
]

MAX_STRIPES_COUNT: Final = 8
"""The most stripes of a call. More connections were not faster."""

TRANSFER_ID_BYTES: Final = 16
"""Size of a transfer's id. The client draws it at random, so that nobody else can join the transfer."""

_STRIPED_CALL: Final = struct.Struct("<BB6xQ16s")
_STRIPE: Final = struct.Struct("<16s")
_PIECE: Final = struct.Struct("<Q")

STRIPED_CALL_BYTES: Final = _STRIPED_CALL.size
"""Size of the payload of a STRIPED_CALL frame without its message."""

STRIPE_HEAD_BYTES: Final = _STRIPE.size
"""Size of the payload of a STRIPE frame."""

PIECE_HEAD_BYTES: Final = _PIECE.size
"""Size of the payload of a PIECE frame."""


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
        timeout_us = max(int(min(self.timeout_s, MAX_TIMEOUT_S) * 1e6), 0)
        head = _STRIPED_CALL.pack(self.method, self.stripes_count, timeout_us, self.transfer)
        return pack_frame(FrameKind.STRIPED_CALL, head + self.message)

    @classmethod
    def parse(cls, payload: bytes) -> StripedCallHead:
        """Return the event in a payload. Raises RemoteProtocolError if there can be no such call."""
        number, stripes_count, timeout_us, transfer = _STRIPED_CALL.unpack_from(payload)
        method = METHODS.get(number)
        if method is None or CALL_KINDS[method] is not FrameKind.CALL:
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
    """The head of a run of pieces, whose elements follow. See `deconvd.direct.pieces`.

    Attributes:
        number: The first piece.
    """

    number: int

    def pack(self) -> bytes:
        """Return the event's frame."""
        return pack_frame(FrameKind.PIECE, _PIECE.pack(self.number))

    @classmethod
    def parse(cls, payload: bytes) -> PieceHead:
        """Return the event in a payload."""
        return cls(*_PIECE.unpack(payload))
