"""Packed elements: a bitmask of those that are not zero, then these alone. Lossless, for tensors after a ReLU.

    | size of an element | 3 zero bytes | count   | bitmask            | elements that are not zero |
      1 byte: 2, 4 or 8                  4 bytes   a bit for each       as in Tensor.raw
                                                   of `count` elements

Numbers are little-endian. Bit ``i % 8`` of byte ``i // 8`` of the bitmask, counted from the least significant bit,
belongs to element ``i``. It is 0 if all bits of the element are 0. So -0.0 is among the elements that follow. The last
bits of the bitmask, which belong to no element, are 0.
"""

from __future__ import annotations

import struct
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from deconvd.errors import InvalidArgumentError

__all__ = [
    "MAX_PACKED_BYTES",
    "MAX_UNPACKED_BYTES",
    "MIN_PACKED_BYTES",
    "PACKED_ELEMENTS",
    "pack",
    "unpack",
]

PACKED_ELEMENTS: Final = "packed_elements"
"""The name of the feature in GetServerInfoResponse."""

MAX_UNPACKED_BYTES: Final = 1 << 20
"""How many bytes of elements are packed together at most. A receiver needs memory for them."""

_HEAD: Final = struct.Struct("<B3xI")
_ELEMENT_BYTES: Final = (2, 4, 8)

MIN_PACKED_BYTES: Final = _HEAD.size + 1
"""The size of the shortest packed elements: zeros alone, at most eight."""

MAX_PACKED_BYTES: Final = _HEAD.size + MAX_UNPACKED_BYTES // 16 + MAX_UNPACKED_BYTES
"""The size of the longest packed elements: those of 2 bytes, without a zero."""

_MAX_SHARE: Final = 0.75
"""Elements are packed if they are smaller than this share of their plain size. Packing costs both ends time."""

_SAMPLES_COUNT: Final = 4096
"""How many elements are looked at before all of them are: a fraction of what packing costs."""

_Words: TypeAlias = npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | npt.NDArray[np.uint64]


def pack(elements: memoryview, element_bytes: int) -> memoryview | None:
    """Return packed elements. None if they would not be much smaller.

    Args:
        elements: Whole elements as in `Tensor.raw`, at most `MAX_UNPACKED_BYTES`.
        element_bytes: The size of an element: 2, 4 or 8.
    """
    words: _Words = np.frombuffer(elements, f"u{element_bytes}")
    # an odd step, since zeros may be in the same columns of each row
    sample = words[:: len(words) // _SAMPLES_COUNT | 1]
    if not _is_small(int(np.count_nonzero(sample)), len(sample), element_bytes):
        return None
    is_nonzero = words != 0
    # `words[is_nonzero]`, and positions in `words` itself, take five times as long
    positions = np.flatnonzero(is_nonzero)
    if not _is_small(len(positions), len(words), element_bytes):
        return None
    mask = np.packbits(is_nonzero, bitorder="little")
    head = _HEAD.pack(element_bytes, len(words))
    return memoryview(b"".join((head, mask.data, words.take(positions).data)))


def _is_small(nonzero_count: int, count: int, element_bytes: int) -> bool:
    packed_bytes = nonzero_count * element_bytes + count / 8
    return packed_bytes < _MAX_SHARE * count * element_bytes


def unpack(packed: memoryview) -> npt.NDArray[np.uint8]:
    """Return the bytes of packed elements. Zeros among the elements that should have none are taken as they are.

    Raises:
        InvalidArgumentError: They are malformed, or more than `MAX_UNPACKED_BYTES`.
    """
    if not MIN_PACKED_BYTES <= len(packed) <= MAX_PACKED_BYTES:
        raise InvalidArgumentError(
            f"packed elements must have from {MIN_PACKED_BYTES} to {MAX_PACKED_BYTES} bytes, got {len(packed)}"
        )
    element_bytes, count = _HEAD.unpack_from(packed)
    if element_bytes not in _ELEMENT_BYTES:
        raise InvalidArgumentError(
            f"packed elements must have 2, 4 or 8 bytes each, got {element_bytes}"
        )
    limit_count = MAX_UNPACKED_BYTES // element_bytes
    if not 0 < count <= limit_count:
        raise InvalidArgumentError(
            f"packed elements must be from 1 to {limit_count} of {element_bytes} bytes, got {count}"
        )
    mask_end = _HEAD.size + (count + 7) // 8
    bits = np.unpackbits(np.frombuffer(packed[_HEAD.size : mask_end], np.uint8), bitorder="little")
    positions = np.flatnonzero(bits.view(np.bool_))
    end = mask_end + len(positions) * element_bytes
    if len(bits) < count or len(packed) != end or bits[count:].any():
        raise InvalidArgumentError(
            f"the bitmask of {count} packed elements must have a bit for each element that follows it and no others, "
            f"got {len(positions)} bits in {len(packed)} bytes"
        )
    words: _Words = np.zeros(count, f"u{element_bytes}")
    words[positions] = np.frombuffer(packed, words.dtype, len(positions), mask_end)
    return words.view(np.uint8)
