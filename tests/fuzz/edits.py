"""Damage to bytes that differ each time, as those of a TLS handshake do: here the input says what to do to them."""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = ["EDITS", "apply_edits"]

_EDIT = struct.Struct("<HBB")
"""Where, what, and with which number."""


def apply_edits(data: bytes, script: bytes) -> bytes:
    """Return bytes after the edits of a script, of which every content is valid; what is left at its end is ignored."""
    for begin in range(0, len(script) - _EDIT.size + 1, _EDIT.size):
        where, what, number = _EDIT.unpack_from(script, begin)
        at = where % (len(data) + 1)
        data = data[:at] + _edit(data[at:], what % 8, number)
    return data


def _edit(rest: bytes, what: int, number: int) -> bytes:
    """Return what comes after a place once it is changed there."""
    if what == 0:
        return bytes([rest[0] ^ (number or 1)]) + rest[1:] if rest else rest
    if what == 1:
        return bytes([number]) + rest[1:]
    if what == 2:
        return rest[number:]
    if what == 3:
        return rest[:number] * 2 + rest[number:]
    if what == 4:
        return bytes(number) + rest
    if what == 5:
        return number.to_bytes(2, "big") + rest[2:]  # a length in TLS has two bytes
    if what == 6:
        return rest[:number]
    return rest + bytes([number]) * number


def _scripts() -> Iterator[bytes]:
    yield b""
    for where in (0, 3, 5, 6, 9, 43, 80, 150, 300, 700, 1500):
        for what in range(8):
            yield _EDIT.pack(where, what, 1 << what)


EDITS = (*_scripts(),)
"""Scripts, the first of which changes nothing."""
