"""Packed elements are those that were packed, bit for bit; what is malformed is refused."""

from __future__ import annotations

import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from deconvd.errors import InvalidArgumentError
from deconvd.wire.packed_elements import (
    MAX_PACKED_BYTES,
    MAX_UNPACKED_BYTES,
    MIN_PACKED_BYTES,
    pack,
    unpack,
)
from tests.packed import pack_by_definition

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
ELEMENT_BYTES = pytest.mark.parametrize("element_bytes", [2, 4, 8])


def patterns(element_bytes: int) -> st.SearchStrategy[Any]:
    """Return the bit patterns of elements: zeros in runs and alone, -0.0, and whatever else there is."""
    minus_zero = 1 << (8 * element_bytes - 1)
    bits = st.sampled_from([0, 0, 1, minus_zero]) | st.integers(0, 256**element_bytes - 1)
    fill = st.just(0)
    return st_numpy.arrays(f"<u{element_bytes}", st.integers(1, 300), elements=bits, fill=fill)


@ELEMENT_BYTES
@given(data=st.data())
def test_any_bits_come_back(element_bytes: int, data: st.DataObject) -> None:
    words = data.draw(patterns(element_bytes))

    assert unpack(memoryview(pack_by_definition(words))).tobytes() == words.tobytes()


@ELEMENT_BYTES
@given(data=st.data())
def test_elements_are_packed_as_the_schema_says_if_that_saves_a_quarter(
    element_bytes: int, data: st.DataObject
) -> None:
    words = data.draw(patterns(element_bytes))
    expected = pack_by_definition(words)

    packed = pack(words.data.cast("B"), element_bytes)

    saves = np.count_nonzero(words) * element_bytes + len(words) / 8 < 0.75 * words.nbytes
    assert (packed is not None) == saves
    assert packed is None or packed.tobytes() == expected


@DTYPE
def test_half_zeros_take_little_more_than_half(dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal(MAX_UNPACKED_BYTES // np.dtype(dtype).itemsize)
    rectified = np.maximum(x, 0).astype(dtype).view(np.uint8)

    packed = pack(rectified.data, np.dtype(dtype).itemsize)

    assert packed is not None
    assert len(packed) < 0.57 * MAX_UNPACKED_BYTES
    assert unpack(packed).tobytes() == rectified.tobytes()


@DTYPE
def test_negative_zeros_stay_negative(dtype: Any) -> None:
    x = np.zeros(4000, dtype)
    x[::5] = -0.0

    packed = pack(x.view(np.uint8).data, x.itemsize)

    assert packed is not None
    assert np.signbit(unpack(packed).view(dtype)).sum() == 800


@DTYPE
def test_elements_without_zeros_are_not_packed(dtype: Any) -> None:
    x = np.ones(MAX_UNPACKED_BYTES // np.dtype(dtype).itemsize, dtype).view(np.uint8)

    assert pack(x.data, np.dtype(dtype).itemsize) is None


def test_zeros_that_only_a_sample_has_are_not_enough() -> None:
    x = np.ones(MAX_UNPACKED_BYTES // 4, np.float32)
    x[:: len(x) // 4096 | 1] = 0

    assert pack(x.view(np.uint8).data, 4) is None


@pytest.mark.parametrize(("nonzero_count", "is_packed"), [(183, True), (184, False)])
def test_a_quarter_must_be_saved(nonzero_count: int, is_packed: bool) -> None:
    """256 elements of 4 bytes have a bitmask of 32 bytes, and three quarters of them are 768 bytes."""
    x = np.zeros(256, np.float32)
    x[:nonzero_count] = 1

    assert (pack(x.data.cast("B"), 4) is not None) is is_packed


def test_zeros_in_columns_are_seen() -> None:
    """Every 64th element, say, is in a column without zeros."""
    x = np.zeros((4096, 64), np.float32)
    x[:, ::2] = 1

    packed = pack(x.data.cast("B"), 4)

    assert packed is not None
    assert unpack(packed).tobytes() == x.tobytes()


def head(element_bytes: int, count: int) -> bytes:
    return struct.pack("<B3xI", element_bytes, count)


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"", "from 9 to 1114120 bytes, got 0"),
        (head(4, 1), "from 9 to 1114120 bytes, got 8"),
        (bytes(MAX_PACKED_BYTES + 1), "from 9 to 1114120 bytes, got 1114121"),
        (head(0, 1) + b"\0", "2, 4 or 8 bytes each, got 0"),
        (head(3, 1) + b"\0", "2, 4 or 8 bytes each, got 3"),
        (head(4, 0) + b"\0", "from 1 to 262144 of 4 bytes, got 0"),
        (head(8, 131_073) + bytes(16_385), "from 1 to 131072 of 8 bytes, got 131073"),
        (head(2, 2**32 - 1) + b"\0", "from 1 to 524288 of 2 bytes, got 4294967295"),
        (head(4, 9) + b"\1", "bitmask of 9 packed elements"),  # it is cut off
        (head(4, 8) + b"\1", "got 1 bits in 9 bytes"),
        (head(4, 8) + b"\1" + bytes(3), "got 1 bits in 12 bytes"),
        (head(4, 8) + b"\1" + bytes(8), "got 1 bits in 17 bytes"),
        (head(4, 7) + b"\x80" + bytes(4), "bitmask of 7 packed elements"),  # an eighth element
    ],
)
def test_malformed_ones_are_refused(packed: bytes, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        unpack(memoryview(packed))


def test_zeros_among_the_others_are_taken_as_they_are() -> None:
    packed = head(4, 3) + b"\5" + struct.pack("<2f", 0.0, 2.0)

    np.testing.assert_array_equal(unpack(memoryview(packed)).view(np.float32), [0, 0, 2])


@given(
    st.sampled_from([0, 1, 2, 4, 8, 255]),
    st.integers(0, 70) | st.integers(0, 2**32 - 1),
    st.binary(max_size=80),
)
def test_whatever_comes_is_elements_or_refused(element_bytes: int, count: int, rest: bytes) -> None:
    packed = memoryview(head(element_bytes, count) + rest)
    try:
        unpacked = unpack(packed)
    except InvalidArgumentError:
        return
    assert len(unpacked) == element_bytes * count <= MAX_UNPACKED_BYTES


@given(data=st.data())
def test_a_damaged_byte_is_refused_or_changes_elements_alone(data: st.DataObject) -> None:
    words = data.draw(patterns(4))
    damaged = bytearray(pack_by_definition(words))
    at = data.draw(st.integers(0, len(damaged) - 1))
    damaged[at] ^= data.draw(st.integers(1, 255))
    try:
        unpacked = unpack(memoryview(damaged))
    except InvalidArgumentError:
        return
    assert len(unpacked) <= MAX_UNPACKED_BYTES


def test_the_shortest_and_the_longest_have_the_sizes_that_frames_may_have() -> None:
    zero, dense = np.zeros(1, np.uint16), np.ones(MAX_UNPACKED_BYTES // 2, np.uint16)

    assert len(pack_by_definition(zero)) == MIN_PACKED_BYTES
    assert len(pack_by_definition(dense)) == MAX_PACKED_BYTES
    assert unpack(memoryview(pack_by_definition(dense))).tobytes() == dense.tobytes()
