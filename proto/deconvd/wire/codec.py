"""Messages to bytes and back, without protobuf's copies of the elements of tensors.

Protobuf copies a ``bytes`` field when it is set, serialized, parsed and read, so a message takes three times its size.
Here the generated classes encode only the small fields. The elements are framed by hand: they are copied once, into the
bytes that gRPC sends, and are read where gRPC has received them.

    bytes of a large request  | small fields    | tag, size of x | type, shape     | tag, size of raw | elements of x |
    written and read by       | generated class | hand           | generated class | hand             | hand          |

The bytes are those of the schema. Any protobuf library can read what `encode` writes, and `decode` reads what any
library writes, with fields in any order. A large message in an unusual form, for example with a tensor in two pieces,
is parsed by the generated classes as a whole: slower, with the same result.
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
    "packed_chunk_from_bytes",
    "packed_chunk_to_bytes",
]

M = TypeVar("M", bound=Message)

Buffer = bytes | memoryview

_MAX_SMALL_BYTES: Final = 64 << 10
"""Up to this size the generated classes are faster than framing in Python: see `benchmarks.framing`."""

MAX_NON_ELEMENT_BYTES: Final = 128 << 10
"""How many bytes a message may have in addition to the elements of tensors.

A parsed message takes up to a hundred times its size. The limit is the same as for a message of a direct connection.
The client's largest message, which drops 4096 tensors, has 82 KB.
"""

_MAX_GENERIC_BYTES: Final = 16 << 20
"""The largest message that the generated classes parse as a whole, which takes three times its size."""

_MAX_CACHED_BYTES: Final = 1 << 10
"""The largest message that is cached: larger than the request of any deconvolution without its elements."""

_MAX_CACHED_COUNT: Final = 1024
"""The number of messages that are cached."""

_MAX_PREFIX_BYTES: Final = 10
"""The longest prefix of a field: its number and its length take five bytes each, at most."""

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
"""Wire types: https://protobuf.dev/programming-guides/encoding."""

_MAX_FIELD_NUMBER: Final = 2**29 - 1

_RAW_NUMBER: Final = pb.Tensor.RAW_FIELD_NUMBER
_PAYLOAD_NUMBERS: Final = range(3, _RAW_NUMBER + 1)

# all stream messages have the same
_CHUNK_NUMBER: Final = pb.DeconvolveStreamRequest.CHUNK_FIELD_NUMBER
_PACKED_CHUNK_NUMBER: Final = pb.DeconvolveStreamRequest.PACKED_CHUNK_FIELD_NUMBER


class Envelope(NamedTuple, Generic[M]):
    """A message without elements, and the elements of its tensors.

    Attributes:
        message: The message; its tensors have no raw payload. It may be in a cache and must not be changed.
        raw: The elements of the tensors that have any, by the names of the fields.
        data: The bytes from which the message was parsed, without elements. None if they are unknown.
    """

    message: M
    raw: Mapping[str, Buffer]
    data: bytes | None = None


_envelope_cache: Final[dict[tuple[type[Message], bytes], Envelope[Any]]] = {}


def encode(envelope: Envelope[M]) -> bytes:
    """Return the bytes of an envelope's message together with the elements.

    Each tensor that has elements must be set in the message. Elements may be any C-contiguous buffer of bytes.
    """
    if not envelope.raw:
        return envelope.message.SerializeToString()
    if sum(map(len, envelope.raw.values())) <= _MAX_SMALL_BYTES:
        whole = type(envelope.message)()
        whole.CopyFrom(envelope.message)
        for name, raw in envelope.raw.items():
            getattr(whole, name).raw = bytes(raw)
        return whole.SerializeToString()
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
    """Return the message in some bytes, which must not be changed. The elements are views of the bytes.

    Small requests without elements (because these are in shared memory, for example) are repeated, so they are cached.
    Messages of types without tensors are not cached: they are not repeated, and may contain secrets. Nor are requests
    that name their calls for logs or traces.

    Raises:
        DecodeError: The bytes are not a valid message.
        ExhaustedError: The bytes have more than `MAX_NON_ELEMENT_BYTES` in addition to elements. Nothing was parsed.
    """
    if len(data) > _MAX_SMALL_BYTES:
        return _decode_large(message_type, data)
    if len(data) > _MAX_CACHED_BYTES:
        return _decode_generic(message_type, data)
    envelope = _envelope_cache.get((message_type, data))
    if envelope is None:
        envelope = _decode_generic(message_type, data)
        if not envelope.raw and _is_repeated(envelope.message):
            _cache_envelope(message_type, data, envelope)
    return envelope


def check_non_element_bytes(message_type: type[Message], data: bytes) -> None:
    """Raise ExhaustedError if bytes have more than `MAX_NON_ELEMENT_BYTES` in addition to elements.

    The bytes need not be a valid message.
    """
    if len(data) <= MAX_NON_ELEMENT_BYTES:
        return
    descriptor = message_type.DESCRIPTOR
    if _non_element_bytes(
        memoryview(data), _chunk_fields(descriptor), _tensor_fields(descriptor)
    ) > (MAX_NON_ELEMENT_BYTES):
        raise ExhaustedError(
            f"a {descriptor.full_name} must have at most {MAX_NON_ELEMENT_BYTES} bytes in addition to the elements "
            f"of its tensors, got more"
        )


def _non_element_bytes(
    data: memoryview, elements: Collection[int], tensors: Collection[int] = ()
) -> int:
    """Return how many bytes of a message are not elements. Counting stops when they are too many.

    Args:
        elements: Numbers of the fields that contain elements.
        tensors: Numbers of the fields that contain tensors.
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
        pass  # the rest counts as no elements: if it is valid, the generated class parses it
    return rest_bytes + len(data) - end


def _decode_large(message_type: type[M], data: bytes) -> Envelope[M]:
    check_non_element_bytes(message_type, data)
    try:
        return _decode_by_hand(message_type, memoryview(data))
    except _UnsupportedLayoutError as unusual:
        # the bytes may still be valid: the generated class decides
        _check_generic_size(data, unusual)
    return _decode_generic(message_type, data)


def _check_generic_size(data: bytes, unusual: _UnsupportedLayoutError) -> None:
    if len(data) > _MAX_GENERIC_BYTES:
        raise ExhaustedError(
            f"a message with {unusual} must have at most {_MAX_GENERIC_BYTES} bytes, got {len(data)}"
        )


def _is_repeated(message: Message) -> bool:
    """Return whether a message is likely to come again: it has tensors, and does not name its call."""
    fields = message.DESCRIPTOR.fields_by_name
    return bool(_tensor_fields(message.DESCRIPTOR)) and not (
        "telemetry" in fields and message.HasField("telemetry")
    )


def _cache_envelope(message_type: type[M], data: bytes, envelope: Envelope[M]) -> None:
    if len(_envelope_cache) >= _MAX_CACHED_COUNT:
        _envelope_cache.clear()
    _envelope_cache[message_type, data] = envelope


def chunk_to_bytes(chunk: Buffer) -> bytes:
    """Return the message of a stream that carries a chunk. The bytes are the same for all stream messages."""
    return b"".join((_field_prefix(_CHUNK_NUMBER, len(chunk)), chunk))


def packed_chunk_to_bytes(packed: Buffer) -> bytes:
    """Return the message of a stream that carries a packed chunk."""
    return b"".join((_field_prefix(_PACKED_CHUNK_NUMBER, len(packed)), packed))


def chunk_from_bytes(data: bytes) -> memoryview | None:
    """Return a view of the chunk in a stream's message. None if the message has anything else."""
    prefix = _prefix_of_whole(_CHUNK_NUMBER, len(data))
    if prefix and data.startswith(prefix):
        return memoryview(data)[len(prefix) :]
    return _only_field(data, _CHUNK_NUMBER)  # a length in more bytes than it needs, say


def packed_chunk_from_bytes(data: bytes) -> memoryview | None:
    """Return a view of the packed chunk in a stream's message. None if the message has anything else."""
    return _only_field(data, _PACKED_CHUNK_NUMBER)


def _only_field(data: bytes, number: int) -> memoryview | None:
    tag = bytes([number << 3 | _LENGTH_DELIMITED])  # a number below 16 has a tag of one byte
    if not data.startswith(tag):
        return None
    view = memoryview(data)
    try:
        size_bytes, begin = _read_varint(view, len(tag))
    except _UnsupportedLayoutError:
        return None
    return view[begin:] if begin + size_bytes == len(view) else None


class _UnsupportedLayoutError(Exception):
    """The bytes are invalid, or in a form that only the generated classes parse.

    The text completes "a message with ...".
    """


@dataclass(frozen=True, slots=True)
class _Field:
    """A field on the wire: its number, its position, and, if it is length-delimited, its value."""

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
            raise _UnsupportedLayoutError("a tensor in several pieces")
        seen.add(field.number)
        header, elements = _split_tensor(field.value)
        small += [_field_prefix(field.number, len(header)), header]
        if elements is not None:
            raw[tensors[field.number]] = elements
    rest = b"".join(small)
    return Envelope(message_type.FromString(rest), raw, rest)


def _split_tensor(data: memoryview) -> tuple[bytes, memoryview | None]:
    """Return the bytes of a tensor without its raw payload, and the payload."""
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
        raise _UnsupportedLayoutError("several payloads of one tensor")
    return b"".join(header), elements


def _decode_generic(message_type: type[M], data: bytes) -> Envelope[M]:
    """Parse a message with the generated class, and move the elements out of it."""
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
    """Return the names of the fields that are tensors, by number."""
    return {
        field.number: field.name
        for field in message_type.fields
        if field.message_type is pb.Tensor.DESCRIPTOR
    }


@cache
def _chunk_fields(message_type: Descriptor) -> frozenset[int]:
    """Return the numbers of the fields that contain elements directly."""
    names = ("chunk", "packed_chunk")
    return frozenset(field.number for field in message_type.fields if field.name in names)


def _iterate_fields(data: memoryview) -> Iterator[_Field]:
    """Yield the fields of a message in the order of the bytes.

    Raises:
        _UnsupportedLayoutError: The bytes are not a valid message, or contain groups.
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
            raise _UnsupportedLayoutError(f"a field of wire type {wire_type}")
        if at > len(data) or not 0 < number <= _MAX_FIELD_NUMBER:
            raise _UnsupportedLayoutError("a field that is cut off or has an invalid number")
        yield _Field(number, start, at, value)


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the variable-length integer at an offset, and the offset after it."""
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
    """Return the prefix of a length-delimited field that has a size together with it; empty if no field has."""
    for prefix_bytes in range(2, min(_MAX_PREFIX_BYTES, size_bytes) + 1):
        prefix = _field_prefix(number, size_bytes - prefix_bytes)
        if len(prefix) == prefix_bytes:
            return prefix
    return b""


@lru_cache(_MAX_CACHED_COUNT)  # nearly all chunks of a stream have one length
def _field_prefix(number: int, length: int) -> bytes:
    """Return the tag and the length that precede the value of a length-delimited field."""
    return _encode_varint(number << 3 | _LENGTH_DELIMITED) + _encode_varint(length)


def _encode_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
