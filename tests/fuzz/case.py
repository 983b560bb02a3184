"""Inputs: how they are drawn, named, and written down so that a test can repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

from google.protobuf.message import Message

from tests.fuzz.damage import damage_bytes, damage_fields, damage_list

__all__ = ["Case", "Part", "Seed"]

Part: TypeAlias = bytes | Message


@dataclass(frozen=True)
class Case:
    """One input. Its `repr` is the Python expression that a regression test passes to `tests.fuzz.run.replay`.

    Attributes:
        kind: Which code of the target gets it.
        parts: Its bytes, in the order in which they are sent or parsed.
    """

    kind: str
    parts: tuple[bytes, ...]


@dataclass(frozen=True)
class Seed:
    """A valid input, from which others are made.

    Attributes:
        kind: As in `Case`.
        parts: As in `Case`; messages that are not yet bytes can also be damaged field by field.
        is_list: Whether parts may be left out, repeated and moved; if not, each has a meaning of its own.
    """

    kind: str
    parts: Sequence[Part]
    is_list: bool = True

    def to_case(self) -> Case:
        """Return the input without any damage."""
        return Case(self.kind, tuple(map(_to_bytes, self.parts)))

    def draw(self, random: Random, others: Sequence[bytes]) -> Case:
        """Return the input with some damage, or, rarely, without.

        Args:
            others: Bytes of other inputs, of which pieces may be inserted.
        """
        parts = list(self.parts)
        damaged = [_to_bytes(part) for part in parts]
        for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
            number = random.randrange(len(parts))
            part = parts[number]
            if isinstance(part, Message) and random.random() < 0.6:
                damaged[number] = damage_fields(part, random).SerializeToString()
            else:
                damaged[number] = damage_bytes(damaged[number], random, others)
        if self.is_list and random.random() < 0.2:
            damage_list(damaged, random)
        return Case(self.kind, tuple(damaged))


def _to_bytes(part: Part) -> bytes:
    return part if isinstance(part, bytes) else part.SerializeToString()
