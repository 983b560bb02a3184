"""Damage to bytes and messages: flipped bits, cuts, splices, lies about lengths, and values at the limits of fields."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["damage_bytes", "damage_fields", "damage_list"]

_NUMBERS = [0, 1, 2, 3, 5, 64, 1 << 12, 1 << 20, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1]
"""Numbers at which sizes, counts and offsets go wrong."""

_MAX_BYTES = 256 << 10
"""Inputs are not grown beyond this size: larger ones are slower, and find the same faults."""


def damage_bytes(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Return bytes with one piece of damage.

    Args:
        others: Bytes of other inputs, of which pieces may be inserted.
    """
    damaged = random.choice(_DAMAGES)(data, random)
    if others and random.random() < 0.1:
        at = random.randint(0, len(damaged))
        damaged = damaged[:at] + _some_piece(random.choice(others), random) + damaged[at:]
    return damaged[:_MAX_BYTES]


def damage_list(parts: list[bytes], random: Random) -> None:
    """Leave out a part, repeat one, or put one in the place of another."""
    at, other = random.randrange(len(parts)), random.randrange(len(parts))
    parts[at : at + 1] = random.choice([[], [parts[at]] * 2, [parts[other]], [b""]])


def damage_fields(message: Message, random: Random) -> Message:
    """Return a copy of a message in which up to two fields have other values."""
    damaged = type(message)()
    damaged.CopyFrom(message)
    for _ in range(random.randint(0, 2)):
        _damage_field(damaged, random)
    return damaged


def _flip_bits(data: bytes, random: Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(random.randint(1, 4) if data else 0):
        damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    return bytes(damaged)


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randint(0, len(data))]


def _remove_piece(data: bytes, random: Random) -> bytes:
    begin, end = _some_range(data, random)
    return data[:begin] + data[end:]


def _repeat_piece(data: bytes, random: Random) -> bytes:
    begin, end = _some_range(data, random)
    return data[:end] + data[begin:end] * random.choice((1, 1, 2, 7)) + data[end:]


def _insert_bytes(data: bytes, random: Random) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + random.randbytes(random.randint(1, 8)) + data[at:]


def _overwrite_bytes(data: bytes, random: Random) -> bytes:
    at = random.randint(0, len(data))
    some = random.randbytes(random.randint(1, 8))
    return data[:at] + some + data[at + len(some) :]


def _overwrite_number(data: bytes, random: Random) -> bytes:
    """Put a number in the place of another of the same width: most formats here have numbers of a fixed width."""
    width, code = random.choice(((1, "B"), (2, "H"), (4, "I"), (8, "Q")))
    number = (random.choice(_NUMBERS) + random.choice((0, 0, 1, -1))) % (1 << 8 * width)
    at = random.randint(0, max(len(data) - width, 0))
    return data[:at] + struct.pack(random.choice("<>") + code, number) + data[at + width :]


def _change_length(data: bytes, random: Random) -> bytes:
    """Change a byte a little, or make it a long variable-length integer: a length of protobuf, most often."""
    if not data:
        return b"\xff"
    at = random.randrange(len(data))
    changed = random.choice(
        (
            bytes([(data[at] + random.choice((1, -1, 2, -2))) % 256]),
            bytes([data[at] | 0x80]) + b"\x80" * random.choice((0, 3, 9)) + b"\x01",
            b"\xff\xff\xff\xff\x0f",
        )
    )
    return data[:at] + changed + data[at + 1 :]


_DAMAGES: list[Callable[[bytes, Random], bytes]] = [
    _flip_bits,
    _truncate,
    _remove_piece,
    _repeat_piece,
    _insert_bytes,
    _overwrite_bytes,
    _overwrite_number,
    _overwrite_number,
    _change_length,
    _change_length,
]


def _some_range(data: bytes, random: Random) -> tuple[int, int]:
    begin = random.randint(0, len(data))
    return begin, min(len(data), begin + random.choice((1, 2, 4, 8, 16, 64, 1024)))


def _some_piece(data: bytes, random: Random) -> bytes:
    begin, end = _some_range(data, random)
    return data[begin:end]


def _damage_field(message: Message, random: Random) -> None:
    """Change a field of a message, or of one inside it."""
    field = random.choice(message.DESCRIPTOR.fields or [None])
    if field is None:
        return
    if random.random() < 0.1:
        message.ClearField(field.name)
    elif field.is_repeated:
        _damage_values(getattr(message, field.name), field, random)
    elif field.message_type is not None:
        getattr(message, field.name).SetInParent()
        _damage_field(getattr(message, field.name), random)
    else:
        setattr(message, field.name, _draw_value(field, random))


def _damage_values(values: Any, field: Any, random: Random) -> None:
    if len(values) and random.random() < 0.5:
        del values[random.randrange(len(values))]
    elif field.message_type is not None:
        inside = values[0] if len(values) and random.random() < 0.5 else values.add()
        _damage_field(inside, random)
    elif len(values) and random.random() < 0.7:
        values[random.randrange(len(values))] = _draw_value(field, random)
    else:
        values.append(_draw_value(field, random))


def _draw_integer(bits: int, random: Random, *, is_signed: bool) -> int:
    number = random.choice(_NUMBERS) % (1 << (bits - is_signed))
    return -number if is_signed and random.random() < 0.4 else number


_TEXTS = [
    "",
    "\0",
    "a\0b",
    "²",
    "\ud7ff\U0010ffff",
    "-1",
    "9" * 5000,
    "/" + "x" * 300,
    "%s",
    "..",
    "ff",
]


def _draw_value(field: Any, random: Random) -> Any:
    """Return a value of a field's type."""
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return random.random() < 0.5
        case FieldDescriptor.CPPTYPE_ENUM:
            return random.choice([0, 1, 2, 3, 4, 5, 99, -1])
        case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_STRING:
            return random.choice(_TEXTS)
        case FieldDescriptor.CPPTYPE_STRING:
            return random.randbytes(random.choice([0, 1, 16, 32, 72]))
        case FieldDescriptor.CPPTYPE_INT32:
            return _draw_integer(32, random, is_signed=True)
        case FieldDescriptor.CPPTYPE_UINT32:
            return _draw_integer(32, random, is_signed=False)
        case FieldDescriptor.CPPTYPE_UINT64:
            return _draw_integer(64, random, is_signed=False)
        case FieldDescriptor.CPPTYPE_INT64:
            return _draw_integer(64, random, is_signed=True)
        case FieldDescriptor.CPPTYPE_DOUBLE:
            return random.choice([0.0, -1.0, 1e-300, 0.5, 1e300, math.inf, -math.inf, math.nan])
        case other:
            raise NotImplementedError(f"no values for fields of type {other}: add some here")
