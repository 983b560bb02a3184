"""Messages as bytes that no writer of ours makes: fields in any order, with others between them that nobody knows."""

from __future__ import annotations

from random import Random

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["UNKNOWN_FIELDS", "scramble", "varint"]

UNKNOWN_FIELDS = {
    "a varint": b"\xa0\x06\x96\x01",
    "a fixed32": b"\xa5\x06abcd",
    "a fixed64": b"\xa1\x06abcdefgh",
    "bytes": b"\xa2\x06\x03abc",
    "a group": b"\xa3\x06\x08\x01\xa4\x06",
}


def scramble(message: Message, random: Random) -> bytes:
    """Return a message as bytes whose fields, and theirs in turn, stand in any order, among unknown ones."""
    fields = [_field(message, field, random) for field, _ in message.ListFields()]
    fields += random.sample(list(UNKNOWN_FIELDS.values()), random.randint(0, 2))
    random.shuffle(fields)
    return b"".join(fields)


def _field(message: Message, field: FieldDescriptor, random: Random) -> bytes:
    if field.message_type is not None and not field.is_repeated:
        inside = scramble(getattr(message, field.name), random)
        return varint(field.number << 3 | 2) + varint(len(inside)) + inside
    alone = type(message)()
    alone.CopyFrom(message)
    for other, _ in message.ListFields():
        if other.name != field.name:
            alone.ClearField(other.name)
    return alone.SerializeToString()


def varint(value: int) -> bytes:
    """Return a number as protobuf writes it, seven bits a byte."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
