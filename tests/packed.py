"""Packed elements by their definition in the schema, for comparison."""

from __future__ import annotations

from typing import Any

__all__ = ["pack_by_definition"]


def pack_by_definition(words: Any) -> bytes:
    """Return elements packed, zeros or not.

    Args:
        words: Unsigned integers with the bits of the elements.
    """
    mask = bytearray((len(words) + 7) // 8)
    rest = bytearray()
    for i, word in enumerate(words.tolist()):
        if word:
            mask[i // 8] |= 1 << i % 8
            rest += word.to_bytes(words.itemsize, "little")
    return bytes([words.itemsize, 0, 0, 0]) + len(words).to_bytes(4, "little") + mask + rest
