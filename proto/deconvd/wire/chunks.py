"""The parts of a stream as gRPC messages, with elements in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from google.protobuf.message import Message

from deconvd.model.dtypes import Array
from deconvd.wire.codec import (
    check_non_element_bytes,
    chunk_from_bytes,
    chunk_to_bytes,
    packed_chunk_from_bytes,
    packed_chunk_to_bytes,
)
from deconvd.wire.packed_elements import unpack
from deconvd.wire.stream_parts import (
    Part,
    PendingElements,
    Uint8Array,
    elements_part,
    parse_part,
    takes_packed,
)

__all__ = ["ChunkSource", "chunk_messages", "part_messages"]

_CHUNK_BYTES: Final = 1 << 20
"""The size of a chunk at which a gRPC stream is fastest. Larger messages cost more for each byte."""

_EMPTY: Final[Uint8Array] = np.empty(0, np.uint8)


class ChunkSource:
    """The parts of a stream that gRPC delivers. See `PartSource`.

    Args:
        messages: The stream's messages, as bytes.
        part_type: The type of these messages.
    """

    is_buffered: bool = True

    def __init__(self, messages: Iterator[bytes], part_type: type[Message]) -> None:
        self._messages = messages
        self._part_type = part_type
        self._has_chunks = "part" in part_type.DESCRIPTOR.oneofs_by_name
        self._takes_packed = takes_packed(part_type)
        self._chunk: Uint8Array = _EMPTY

    def next(self) -> Message | PendingElements | None:
        """Return the next part. None at the end."""
        data = next(self._messages, None)
        if data is None:
            return None
        if not self._has_chunks:
            return self._parse(data)
        chunk = chunk_from_bytes(data)
        if chunk is not None:
            return self._begin_chunk(chunk)
        packed = packed_chunk_from_bytes(data) if self._takes_packed else None
        if packed is not None:
            return self._begin_packed_chunk(packed)
        message: Any = self._parse(data)
        if self._takes_packed and message.HasField("packed_chunk"):
            return self._begin_packed_chunk(memoryview(message.packed_chunk))
        return self._begin_chunk(message.chunk) if message.HasField("chunk") else message

    def read_into(self, target: Uint8Array) -> None:
        """Fill `target` with the next of the pending elements."""
        target[:] = self._chunk[: len(target)]
        rest = self._chunk[len(target) :]
        self._chunk = rest if len(rest) else _EMPTY  # an empty view would keep the message alive

    def _parse(self, data: bytes) -> Message:
        check_non_element_bytes(self._part_type, data)
        return parse_part(self._part_type, data)

    def _begin_chunk(self, chunk: bytes | memoryview) -> PendingElements:
        self._chunk = np.frombuffer(chunk, np.uint8)
        return PendingElements(len(chunk))

    def _begin_packed_chunk(self, packed: memoryview) -> PendingElements:
        self._chunk = unpack(packed)
        return PendingElements(len(self._chunk), is_packed=True)


def part_messages(part: Part) -> Iterator[bytes]:
    """Yield the messages for a part. The elements of each message are copied only when it is requested."""
    if isinstance(part, Message):
        return iter((part.SerializeToString(),))
    if part.is_packed:
        return iter((packed_chunk_to_bytes(part.data),))
    return map(chunk_to_bytes, [piece.data for piece in part.pieces(_CHUNK_BYTES)])


def chunk_messages(array: Array) -> Iterator[bytes]:
    """Yield the messages for an array's elements."""
    return part_messages(elements_part(array))
