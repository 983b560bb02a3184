"""Messages to bytes and back without protobuf's copies of the large fields.

Protobuf copies a ``bytes`` field when it is set, serialized, parsed and read: a message takes three times its size.
Here the small fields go through the generated classes and the large one is framed by hand: it is copied once, into the
bytes that gRPC sends, and read where gRPC has put it. The bytes are those of the schema: any protobuf library reads
what is written here, and what any writes is read here, fields in whatever order.

A message that is large in another way than ours are (a tensor given in two pieces, say) goes through the generated
classes as a whole: slower, and right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Final, Generic, NamedTuple, TypeVar

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from deconvd.errors import ExhaustedError
from deconvd.v1 import deconvd_pb2 as pb

__all__ = [
    "MAX_NON_ELEMENT_BYTES",
    "Buffer",
    "Envelope",
    "check_non_element_bytes",
    "chunk_from_bytes",
    "chunk_to_bytes",
    "decode",
    "encode",
    "missing_chunk_from_bytes",
    "missing_chunk_to_bytes",
]

M = TypeVar("M", bound=Message)

Buffer = bytes | memoryview

_MAX_SMALL_BYTES: Final = 64 << 10
"""Up to this size the generated classes are faster than framing in Python: see `benchmarks.framing`."""

MAX_NON_ELEMENT_BYTES: Final = 128 << 10
"""What a message may have beside the elements of tensors. Parsed, it takes up to a hundred times as much.

As much as a direct line's messages have in all. The longest of ours, 4096 handles to drop, has 82 KB.
"""

_MAX_GENERIC_BYTES: Final = 16 << 20
"""What the generated classes are given: they take a message three times."""

_MAX_CACHED_BYTES: Final = 1 << 10
_MAX_CACHED_COUNT: Final = 1024
"""More than a message has beside elements, and as many as are remembered."""

_MAX_PREFIX_BYTES: Final = 10
"""A field's number and its length: five bytes each, at most."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
"""Wire types: https://protobuf.dev/programming-guides/encoding."""

_MAX_FIELD_NUMBER: Final = 2**29 - 1

_RAW_NUMBER: Final = pb.Tensor.RAW_FIELD_NUMBER
_PAYLOAD_NUMBERS: Final = range(3, _RAW_NUMBER + 1)
_CHUNK_NUMBER: Final = pb.DeconvolveStreamRequest.CHUNK_FIELD_NUMBER
_MISSING_CHUNK_NUMBER: Final = pb.DeconvolveStreamRequest.MISSING_CHUNK_FIELD_NUMBER


class Envelope(NamedTuple, Generic[M]):
    """A message, and apart from it the raw elements of its tensors.

    Attributes:
        message: Its tensors have no raw payload. It may be another's too: it is not to be changed.
        raw: The elements of each tensor that has some, by the name of its field.
        data: The bytes that the message was read from, without elements; None if they are not known.
    """

    message: M
    raw: Mapping[str, Buffer]
    data: bytes | None = None


_envelope_cache: Final[dict[tuple[type[Message], bytes], Envelope[Any]]] = {}


def encode(envelope: Envelope[M]) -> bytes:
    """Return the bytes of a message: that of the envelope with its tensors' elements put in.

    The tensors with elements must be set in the message; elements may be any C-contiguous buffer
    of bytes.
    """
    if not envelope.raw:
        return envelope.message.SerializeToString()
    if sum(map(len, envelope.raw.values())) <= _MAX_SMALL_BYTES:
        return _merge_raw(envelope).SerializeToString()
    rest = type(envelope.message)()
    rest.CopyFrom(envelope.message)
    pieces: list[Buffer] = [b""]
    for name, raw in envelope.raw.items():
        rest.ClearField(name)
        header = getattr(envelope.message, name).SerializeToString()
        header += _field_prefix(_RAW_NUMBER, len(raw))
        number = envelope.message.DESCRIPTOR.fields_by_name[name].number
        pieces += [_field_prefix(number, len(header) + len(raw)), header, raw]
    pieces[0] = rest.SerializeToString()
    return b"".join(pieces)


def decode(message_type: type[M], data: bytes) -> Envelope[M]:
    """Return the message that bytes hold, which is not to be changed; elements are views of the bytes.

    What may have elements and has none (they lie in shared memory, say) comes again and again: it is remembered.
    Other messages come once, and may hold secrets.

    Raises:
        DecodeError: They hold no such message.
        ExhaustedError: They have more than `MAX_NON_ELEMENT_BYTES` beside elements: nothing is parsed.
    """
    if len(data) > _MAX_SMALL_BYTES:
        return _decode_large(message_type, data)
    if len(data) > _MAX_CACHED_BYTES:
        return _decode_generic(message_type, data)
    envelope = _envelope_cache.get((message_type, data))
    if envelope is None:
        envelope = _decode_generic(message_type, data)
        if not envelope.raw and _tensor_fields(message_type.DESCRIPTOR):
            _cache_envelope(message_type, data, envelope)
    return envelope


def check_non_element_bytes(message_type: type[Message], data: bytes) -> None:
    """Raise ExhaustedError if bytes have more than `MAX_NON_ELEMENT_BYTES` beside elements, whatever else they are."""
    if len(data) <= MAX_NON_ELEMENT_BYTES:
        return
    descriptor = message_type.DESCRIPTOR
    if _non_element_bytes(
        memoryview(data), _chunk_fields(descriptor), _tensor_fields(descriptor)
    ) > (MAX_NON_ELEMENT_BYTES):
        raise ExhaustedError(
            f"the message has more than {MAX_NON_ELEMENT_BYTES} bytes beside the elements of tensors, "
            f"which is what a {descriptor.full_name} may have"
        )


def _non_element_bytes(
    data: memoryview, elements: Collection[int], tensors: Collection[int] = ()
) -> int:
    """Return how many bytes of a message are no elements; some of them, once they are too many.

    Args:
        elements: Numbers of the fields that are elements.
        tensors: Numbers of the fields that are tensors.
    """
    rest_bytes = end = 0
    try:
        for field in _iterate_fields(data):
            end, value = field.end, field.value
            rest_bytes += end - field.start
            if value is not None and field.number in elements:
                rest_bytes -= len(value)
            elif value is not None and field.number in tensors:
                rest_bytes += _non_element_bytes(value, (_RAW_NUMBER,)) - len(value)
            if rest_bytes > MAX_NON_ELEMENT_BYTES:
                return rest_bytes
    except _UnsupportedLayoutError:
        pass  # all that follows is read by the generated class, if it can
    return rest_bytes + len(data) - end


def _decode_large(message_type: type[M], data: bytes) -> Envelope[M]:
    check_non_element_bytes(message_type, data)
    try:
        return _decode_by_hand(message_type, memoryview(data))
    except _UnsupportedLayoutError as unusual:
        # not wrong, as far as is known here: the generated class decides
        _check_generic_size(data, unusual)
    return _decode_generic(message_type, data)


def _check_generic_size(data: bytes, unusual: _UnsupportedLayoutError) -> None:
    if len(data) > _MAX_GENERIC_BYTES:
        raise ExhaustedError(
            f"the message has {len(data)} bytes and {unusual}: such a message may have at most "
            f"{_MAX_GENERIC_BYTES} bytes"
        )


def _cache_envelope(message_type: type[M], data: bytes, envelope: Envelope[M]) -> None:
    if len(_envelope_cache) >= _MAX_CACHED_COUNT:
        _envelope_cache.clear()
    _envelope_cache[message_type, data] = envelope


def chunk_to_bytes(chunk: Buffer) -> bytes:
    """Return the bytes of a stream's part that is a chunk, of whichever of the stream messages."""
    return b"".join((_field_prefix(_CHUNK_NUMBER, len(chunk)), chunk))


def missing_chunk_to_bytes(chunk: Buffer) -> bytes:
    """Return the bytes of a part that is a chunk of what was missing, in the manner of `chunk_to_bytes`."""
    return b"".join((_field_prefix(_MISSING_CHUNK_NUMBER, len(chunk)), chunk))


def chunk_from_bytes(data: bytes) -> memoryview | None:
    """Return a view of the chunk if a part's bytes hold that and nothing else, else None."""
    prefix = _prefix_of_whole(_CHUNK_NUMBER, len(data))
    if prefix and data.startswith(prefix):
        return memoryview(data)[len(prefix) :]
    return _only_field(data, _CHUNK_NUMBER)  # a length in more bytes than it needs, say


def missing_chunk_from_bytes(data: bytes) -> memoryview | None:
    """Return a view of a chunk of what was missing, in the manner of `chunk_from_bytes`."""
    return _only_field(data, _MISSING_CHUNK_NUMBER)


def _only_field(data: bytes, number: int) -> memoryview | None:
    view = memoryview(data)
    try:
        field = next(_iterate_fields(view), None)
    except _UnsupportedLayoutError:
        return None
    if field is None or field.number != number or field.value is None:
        return None
    return field.value if field.end == len(view) else None


class _UnsupportedLayoutError(Exception):
    """Bytes that are wrong, or not in the form that is read fast."""


@dataclass(frozen=True, slots=True)
class _Field:
    """A field on the wire: its number, its place, and its value if it is length-delimited."""

    number: int
    start: int
    end: int
    value: memoryview | None


def _decode_by_hand(message_type: type[M], data: memoryview) -> Envelope[M]:
    tensors = _tensor_fields(message_type.DESCRIPTOR)
    small: list[Buffer] = []
    raw: dict[str, Buffer] = {}
    seen: set[int] = set()
    for field in _iterate_fields(data):
        if field.number not in tensors or field.value is None:
            small.append(data[field.start : field.end])
            continue
        if field.number in seen:
            raise _UnsupportedLayoutError("a tensor in pieces, which are to be merged")
        seen.add(field.number)
        header, elements = _split_tensor(field.value)
        small += [_field_prefix(field.number, len(header)), header]
        if elements is not None:
            raw[tensors[field.number]] = elements
    rest = b"".join(small)
    return Envelope(message_type.FromString(rest), raw, rest)


def _split_tensor(data: memoryview) -> tuple[bytes, memoryview | None]:
    """Return the bytes of a tensor without its raw payload, and that payload."""
    header: list[Buffer] = []
    elements: memoryview | None = None
    payloads_count = 0
    for field in _iterate_fields(data):
        payloads_count += field.number in _PAYLOAD_NUMBERS
        if field.number == _RAW_NUMBER and field.value is not None:
            elements = field.value
        else:
            header.append(data[field.start : field.end])
    if payloads_count > 1:
        raise _UnsupportedLayoutError("several payloads, of which the last counts")
    return b"".join(header), elements


def _merge_raw(envelope: Envelope[M]) -> M:
    """Return the message that an envelope stands for, with the elements in it."""
    message = type(envelope.message)()
    message.CopyFrom(envelope.message)
    for name, raw in envelope.raw.items():
        getattr(message, name).raw = bytes(raw)
    return message


def _decode_generic(message_type: type[M], data: bytes) -> Envelope[M]:
    """Return an envelope of a message that the generated class parses."""
    message = message_type.FromString(data)
    raw: dict[str, Buffer] = {}
    for name in _tensor_fields(message.DESCRIPTOR).values():
        tensor = getattr(message, name)
        if tensor.HasField("raw"):
            raw[name] = tensor.raw
            tensor.ClearField("raw")
    return Envelope(message, raw, None if raw else data)


@cache
def _tensor_fields(message_type: Descriptor) -> dict[int, str]:
    """Return the names of a message's fields that are tensors, by their numbers."""
    return {
        field.number: field.name
        for field in message_type.fields
        if field.message_type is pb.Tensor.DESCRIPTOR
    }


@cache
def _chunk_fields(message_type: Descriptor) -> frozenset[int]:
    """Return the numbers of a message's fields that are elements themselves."""
    names = ("chunk", "missing_chunk")
    return frozenset(field.number for field in message_type.fields if field.name in names)


def _iterate_fields(data: memoryview) -> Iterator[_Field]:
    """Yield the fields of a message in the order in which they stand.

    Raises:
        _UnsupportedLayoutError: The bytes are no message, or have groups.
    """
    at = 0
    while at < len(data):
        start = at
        tag, at = _read_varint(data, at)
        number, wire_type = tag >> 3, tag & 7
        value = None
        if wire_type == _LENGTH_DELIMITED:
            length, at = _read_varint(data, at)
            value = data[at : at + length]
            at += length
        elif wire_type == _VARINT:
            _, at = _read_varint(data, at)
        elif wire_type in (_FIXED32, _FIXED64):
            at += 4 if wire_type == _FIXED32 else 8
        else:
            raise _UnsupportedLayoutError(f"wire type {wire_type}")
        if at > len(data) or not 0 < number <= _MAX_FIELD_NUMBER:
            raise _UnsupportedLayoutError("a field that is cut off, or has no valid number")
        yield _Field(number, start, at, value)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the variable-length integer at an offset, and the offset behind it."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            break
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _UnsupportedLayoutError("an integer that is cut off or too long")


@lru_cache(_MAX_CACHED_COUNT)
def _prefix_of_whole(number: int, size_bytes: int) -> bytes:
    """Return the prefix of a length-delimited field that takes that many bytes with it; none if no field does."""
    for prefix_bytes in range(2, min(_MAX_PREFIX_BYTES, size_bytes) + 1):
        prefix = _field_prefix(number, size_bytes - prefix_bytes)
        if len(prefix) == prefix_bytes:
            return prefix
    return b""


@lru_cache(_MAX_CACHED_COUNT)  # nearly all chunks of a stream have one length
def _field_prefix(number: int, length: int) -> bytes:
    """Return what stands before a length-delimited field."""
    return _encode_varint(number << 3 | _LENGTH_DELIMITED) + _encode_varint(length)


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
