"""Arrays as messages: the elements arrive bit by bit, and nothing is allocated for what is only declared."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, ELEMENT_TYPES, Array, DType
from deconvd.model.problem import TensorSpec, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.tensor import (
    array_from_message,
    element_type_from_number,
    element_type_number,
    message_from_array,
    message_from_spec,
    spec_from_message,
)

FLOAT32 = pb.ELEMENT_TYPE_FLOAT32
shapes = st.lists(st.integers(0, 4), max_size=5).map(tuple)


@given(shapes, st.sampled_from(ELEMENT_TYPES), st.randoms())
def test_any_bits_of_any_shape_arrive_as_they_were(
    shape: tuple[int, ...], dtype: DType, random: Random
) -> None:
    bits = random.randbytes(math.prod(shape) * dtype.itemsize)  # NaNs and all
    array = np.frombuffer(bits, dtype).reshape(shape)

    message = pb.Tensor.FromString(message_from_array(array).SerializeToString())
    arrived = array_from_message("x", message)

    assert (arrived.shape, arrived.dtype) == (array.shape, array.dtype)
    assert arrived.tobytes() == bits


@pytest.mark.parametrize(
    "layout",
    [
        np.asfortranarray,
        lambda a: a[:, ::-1, 1:, ::2],
        lambda a: a.transpose(3, 0, 2, 1),
        lambda a: np.broadcast_to(a[:1], a.shape),
    ],
    ids=["Fortran", "strided", "transposed", "broadcast"],
)
@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_an_array_of_any_layout_is_sent_row_major(
    layout: Callable[[Array], Array], dtype: DType
) -> None:
    array = layout(np.arange(120).reshape(2, 3, 4, 5).astype(dtype))

    arrived = array_from_message("x", message_from_array(array))

    assert arrived.flags.c_contiguous
    np.testing.assert_array_equal(arrived, array)


@pytest.mark.parametrize("name", ["f2", "f4", "f8"])
def test_a_big_endian_array_is_sent_little_endian(name: str) -> None:
    array = np.array([1.5, -2, 3], f">{name}")

    message = message_from_array(array)

    assert message.raw == np.array([1.5, -2, 3], f"<{name}").tobytes()
    assert spec_of(array) == TensorSpec((3,), np.dtype(name))


def test_bfloat16_on_the_wire_is_the_upper_half_of_a_float32() -> None:
    message = message_from_array(np.array([-2.5], BFLOAT16))

    assert message.raw == np.array([-2.5], "<f4").tobytes()[2:]


def test_an_array_that_arrives_is_read_only_and_owns_no_copy() -> None:
    arrived = array_from_message("x", message_from_array(np.zeros((2, 3), np.float32)))

    assert not arrived.flags.writeable
    assert not arrived.flags.owndata


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_each_element_type_has_a_number_of_its_own(dtype: DType) -> None:
    assert element_type_from_number(element_type_number(dtype)) == dtype


def test_every_element_type_of_the_schema_is_known_but_unspecified() -> None:
    known = {number for number in pb.ElementType.values() if element_type_from_number(number)}

    assert known == set(pb.ElementType.values()) - {pb.ELEMENT_TYPE_UNSPECIFIED}


@pytest.mark.parametrize("number", [0, 5, -1])
def test_an_unknown_element_type_is_refused(number: int) -> None:
    message = pb.Tensor(shape=[1], raw=b"1234")
    message.element_type = number  # type: ignore[assignment]  # a newer client's

    with pytest.raises(InvalidArgumentError) as raised:
        array_from_message("gy", message)

    assert str(raised.value) == (
        "gy must have one of the element types ELEMENT_TYPE_FLOAT16, ELEMENT_TYPE_BFLOAT16, "
        f"ELEMENT_TYPE_FLOAT32, ELEMENT_TYPE_FLOAT64, got number {number}"
    )
    assert raised.value.argument == "gy"


def test_a_description_has_a_shape_and_no_elements() -> None:
    spec = TensorSpec((3, 0, 2**31 - 1, 7), BFLOAT16)

    message = message_from_spec(spec)

    assert message.WhichOneof("payload") is None
    assert spec_from_message("x", message) == spec


def test_a_tensor_without_elements_is_refused_where_they_are_needed() -> None:
    message = message_from_spec(TensorSpec((2, 2), np.dtype(np.float32)))

    with pytest.raises(InvalidArgumentError, match="W must have its elements as raw") as raised:
        array_from_message("W", message)

    assert raised.value.argument == "W"


def test_a_payload_of_a_later_version_is_refused_as_unknown() -> None:
    described = message_from_spec(TensorSpec((1,), np.dtype(np.float32))).SerializeToString()
    later = pb.Tensor.FromString(described + bytes([14 << 3 | 2, 1]) + b"h")  # field 14, one byte

    with pytest.raises(InvalidArgumentError, match="no payload or an unknown one"):
        array_from_message("x", later)


@pytest.mark.parametrize(
    ("shape", "length"),
    [((2, 3), 23), ((2, 3), 25), ((2, 3), 0), ((0, 3), 4), ((), 0), ((2**31 - 1,) * 3, 4)],
    ids=str,
)
def test_elements_of_another_length_than_declared_are_refused(
    shape: tuple[int, ...], length: int
) -> None:
    message = pb.Tensor(element_type=FLOAT32, shape=shape, raw=bytes(length))

    with pytest.raises(InvalidArgumentError, match=r"x(: each dimension)? must ") as raised:
        array_from_message("x", message)

    assert raised.value.argument == "x"


def test_the_length_given_and_the_length_wanted_are_both_in_the_message() -> None:
    message = pb.Tensor(element_type=FLOAT32, shape=[2, 3], raw=bytes(23))

    with pytest.raises(InvalidArgumentError) as raised:
        array_from_message("x", message)

    assert (
        str(raised.value) == "x must have 24 bytes of elements for float32 of shape (2, 3), got 23"
    )


@pytest.mark.parametrize(
    "shape",
    [
        [-1, 2],
        [-1, 0],
        [-(2**63)] * 4,
        [0] * 9,
        [1] * 100_000,
        [0, 2**31],
        [2**63 - 1, 0],
        [0, 2**31 - 1, 2**31 - 1, 2**31 - 1],  # no bytes, but numpy cannot count the elements
    ],
    ids=lambda shape: f"{len(shape)}-{shape[0]}",
)
@pytest.mark.parametrize("read", [spec_from_message, array_from_message])
def test_a_shape_that_no_tensor_has_is_refused_in_few_words(
    read: Callable[[str, pb.Tensor], object], shape: list[int]
) -> None:
    message = pb.Tensor(element_type=FLOAT32, shape=shape, raw=b"")

    with pytest.raises(InvalidArgumentError) as raised:
        read("x", message)

    assert raised.value.argument == "x"
    assert len(str(raised.value)) < 300
