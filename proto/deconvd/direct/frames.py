"""What all frames of direct connections are made of: their head, their kinds, and the numbers of methods. Pure."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

__all__ = [
    "CALL_KINDS",
    "FRAME_HEAD",
    "FRAME_HEAD_BYTES",
    "MAX_MESSAGE_BYTES",
    "MAX_TIMEOUT_S",
    "METHODS",
    "FrameKind",
    "MethodCode",
    "pack_frame",
]

MAX_MESSAGE_BYTES: Final = 128 << 10
"""The largest payload other than elements: each end must be able to buffer one for each connection."""

FRAME_HEAD: Final = struct.Struct("<B3xI")
"""The head of a frame: its kind, and the size of its payload in bytes."""

FRAME_HEAD_BYTES: Final = FRAME_HEAD.size

MAX_TIMEOUT_S: Final = 1e12
"""Longer timeouts are sent as this one (about 30,000 years), so that their microseconds fit into 64 bits."""


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


CALL_KINDS: Final[Mapping[MethodCode, FrameKind]] = {
    MethodCode.Deconvolve: FrameKind.CALL,
    MethodCode.DeconvolveGrad: FrameKind.CALL,
    MethodCode.DeconvolveStream: FrameKind.STREAM_CALL,
    MethodCode.DeconvolveGradStream: FrameKind.STREAM_CALL,
    MethodCode.PutTensor: FrameKind.STREAM_CALL,
    MethodCode.GetTensor: FrameKind.FETCH_CALL,
}
"""The kind of a call that is not overlapped. Only methods of kind CALL can be called overlapped."""

METHODS: Final[Mapping[int, MethodCode]] = {method.value: method for method in MethodCode}
"""The methods by their numbers."""


def pack_frame(kind: int, payload: bytes) -> bytes:
    """Return the bytes of a frame. Its kind and size are not checked."""
    return FRAME_HEAD.pack(kind, len(payload)) + payload
