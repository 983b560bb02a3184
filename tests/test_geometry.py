"""How the filter moves: what arguments mean, the sizes that follow, and what is refused with which words."""

from __future__ import annotations

import itertools
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd.errors import InvalidArgumentError
from deconvd.model.geometry import MAX_EXTENT, Geometry, parse_sizes, shorten

sizes = st.integers(1, 6)
pairs = st.tuples(sizes, sizes)


@pytest.mark.parametrize("pair", [(2, 3), [2, 3], np.array([2, 3]), (np.int8(2), np.uint64(3))])
def test_any_sequence_of_two_integers_is_a_pair(pair: Any) -> None:
    geometry = Geometry.from_arguments(stride=pair, pad=pair, dilate=pair, outsize=pair)

    assert geometry == Geometry(stride=(2, 3), pad=(2, 3), dilate=(2, 3), outsize=(2, 3))
    assert {type(value) for value in geometry.stride + geometry.pad} == {int}


@pytest.mark.parametrize("value", [2, np.int64(2), np.array(2), True + True])
def test_one_integer_stands_for_both_axes(value: Any) -> None:
    geometry = Geometry.from_arguments(stride=value, pad=value, dilate=value, groups=value)

    assert geometry == Geometry(stride=(2, 2), pad=(2, 2), dilate=(2, 2), groups=2)


def test_arguments_left_out_have_chainers_defaults() -> None:
    assert Geometry.from_arguments() == Geometry((1, 1), (0, 0), (None, None), (1, 1), 1)


@pytest.mark.parametrize("outsize", [(None, 7), [None, np.int32(7)]])
def test_an_axis_of_outsize_may_be_left_open(outsize: Any) -> None:
    assert Geometry.from_arguments(outsize=outsize).outsize == (None, 7)


def test_equal_geometries_are_one_key() -> None:
    assert len({Geometry.from_arguments(stride=2), Geometry(stride=(2, 2))}) == 1


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("stride", "ab", "stride must be an int or a pair of ints, got 'a'"),
        ("stride", (1, 2, 3), r"stride must be an int or a pair of ints, got \(1, 2, 3\)"),
        ("stride", np.array(2.0), r"stride must be an int or a pair of ints, got array\(2\.\)"),
        ("pad", (1,), r"pad must be an int or a pair of ints, got \(1,\)"),
        ("pad", 1.0, "pad must be an int or a pair of ints, got 1.0"),
        ("dilate", None, "dilate must be an int or a pair of ints, got None"),
        ("dilate", (1, 2.5), "dilate must be an int or a pair of ints, got 2.5"),
        ("outsize", 5, "outsize must be None or a pair, each an int or None, got 5"),
        ("outsize", (5, "6"), "outsize must be None or a pair, each an int or None, got '6'"),
        ("groups", (1, 1), r"groups must be an int, got \(1, 1\)"),
        ("groups", 1.0, "groups must be an int, got 1.0"),
    ],
)
def test_an_argument_of_another_kind_is_refused(argument: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        Geometry.from_arguments(**{argument: value})

    assert raised.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("stride", 0, rf"stride must be from 1 to {MAX_EXTENT}, got \(0, 0\)"),
        ("stride", (1, -2), rf"stride must be from 1 to {MAX_EXTENT}, got \(1, -2\)"),
        ("stride", (1, 2**31), r"stride must be from 1 .*, got \(1, 2147483648\)"),
        ("pad", (0, -1), rf"pad must be from 0 to {MAX_EXTENT}, got \(0, -1\)"),
        ("pad", 2**70, "pad must be from 0"),
        ("dilate", 2**31, "dilate must be from 1"),
        ("outsize", (0, None), rf"outsize must be from 1 to {MAX_EXTENT}, got 0"),
        ("outsize", (3, -1), rf"outsize must be from 1 to {MAX_EXTENT}, got \(3, -1\)"),
        ("groups", 0, rf"groups must be from 1 to {MAX_EXTENT}, got 0"),
        ("groups", 2**31, "groups must be from 1"),
    ],
)
def test_a_value_out_of_range_is_refused(argument: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        Geometry.from_arguments(**{argument: value})

    assert raised.value.argument == argument


@pytest.mark.parametrize("dilate", [0, -3, (0, 1), [2, 0]])
def test_a_dilate_below_1_gets_chainers_message_with_the_argument_as_given(dilate: Any) -> None:
    with pytest.raises(ValueError, match="Dilate should be positive") as raised:
        Geometry.from_arguments(dilate=dilate)

    assert str(raised.value) == f"Dilate should be positive, but {dilate} is supplied."


def test_a_geometry_that_is_made_by_itself_refuses_such_a_dilate_in_the_same_words() -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Geometry(dilate=(1, 0))

    assert str(raised.value) == "Dilate should be positive, but (1, 0) is supplied."
    assert raised.value.argument == "dilate"


def test_a_value_is_at_most_what_32_bits_hold() -> None:
    assert MAX_EXTENT == 2147483647
    assert Geometry(stride=(2147483647, 1)).stride == (2147483647, 1)


@pytest.mark.parametrize(
    ("bits_count", "message"),
    [
        (256, f"pad must be from 0 to 2147483647, got {(2**255, 2**255)}"),
        (257, "pad must be at most 2147483647, got an int of 257 bits"),
        (100_000, "pad must be at most 2147483647, got an int of 100000 bits"),
    ],
)
@pytest.mark.parametrize("is_pair", [False, True])
def test_a_very_long_integer_is_not_written(
    bits_count: int, message: str, *, is_pair: bool
) -> None:
    pad = 2 ** (bits_count - 1)
    with pytest.raises(InvalidArgumentError) as raised:
        Geometry.from_arguments(pad=(pad, pad) if is_pair else pad)

    assert (str(raised.value), raised.value.argument) == (message, "pad")


@given(
    image=pairs, kernel=pairs, stride=pairs, dilate=pairs, pad=st.tuples(*[st.integers(0, 9)] * 2)
)
def test_the_natural_size_is_what_the_taps_reach_less_pad_at_both_ends(
    image: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilate: tuple[int, int],
    pad: tuple[int, int],
) -> None:
    geometry = Geometry(stride=stride, pad=pad, dilate=dilate)

    reached = [
        {
            stride[axis] * i + dilate[axis] * k
            for i in range(image[axis])
            for k in range(kernel[axis])
        }
        for axis in (0, 1)
    ]

    assert geometry.natural_size(image, kernel) == tuple(
        max(reached[axis]) + 1 - 2 * pad[axis] for axis in (0, 1)
    )


@pytest.mark.parametrize("image", [1, 4])
@pytest.mark.parametrize("stride", [1, 3])
def test_outsize_may_be_less_than_a_stride_from_the_natural_size_on_each_axis_alone(
    image: int, stride: int
) -> None:
    natural = stride * (image - 1) + 5
    allowed = range(max(1, natural - stride + 1), natural + stride)

    for size in range(1, natural + 2 * stride):
        geometry = Geometry(stride=(1, stride), outsize=(None, size))
        if size in allowed:
            assert geometry.output_size((7, image), (1, 5)) == (7, size)
        else:
            with pytest.raises(InvalidArgumentError, match="outsize: width must be from"):
                geometry.output_size((7, image), (1, 5))


def test_an_outsize_out_of_range_is_refused_with_the_range() -> None:
    geometry = Geometry(stride=(3, 2), outsize=(None, 4))

    with pytest.raises(InvalidArgumentError) as raised:
        geometry.output_size((5, 4), (3, 3))

    assert str(raised.value) == (
        "outsize: width must be from 8 to 10 (the natural size is 9; outsize may differ from it by at most "
        "stride - 1), got 4"
    )


def test_the_range_of_an_outsize_begins_at_one() -> None:
    with pytest.raises(InvalidArgumentError, match=r"height must be from 1 to 3 .* got 4"):
        Geometry(stride=(3, 1), outsize=(4, None)).output_size((1, 1), (1, 1))


@pytest.mark.parametrize("size", [1, MAX_EXTENT])
def test_an_output_may_have_one_pixel_and_as_many_as_cudnn_can_index(size: int) -> None:
    assert Geometry().output_size((1, size), (1, 1)) == (1, size)


@pytest.mark.parametrize(
    ("pad", "message"),
    [
        ((2, 0), "^Height in the output must be positive. It would be 0: change"),
        ((0, 3), "^Width in the output must be positive. It would be -2: change"),
    ],
)
def test_an_empty_output_is_refused(pad: tuple[int, int], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Geometry(pad=pad).output_size((2, 2), (3, 3))


def test_an_output_that_cudnn_could_not_index_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match=f"Width in the output must be at most {MAX_EXTENT}"
    ):
        Geometry(stride=(1, MAX_EXTENT)).output_size((2, 3), (1, 1))


def test_the_arguments_of_a_geometry_make_the_same_geometry() -> None:
    geometry = Geometry((2, 3), (1, 0), (None, 7), (4, 5), groups=6)

    assert Geometry.from_arguments(**geometry.arguments) == geometry


@pytest.mark.parametrize(
    "value",
    [{1, 2}, {1: 0, 2: 0}, b"\1\2", itertools.count(1), range(1, 10**12), [1] * 100_000],
    ids=["set", "dict", "bytes", "endless", "long", "longer"],
)
def test_a_pair_has_two_values_in_order(value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="stride must be an int or a pair") as raised:
        Geometry.from_arguments(stride=value)

    assert len(str(raised.value)) < 300


def test_a_value_that_cannot_be_shown_is_called_by_its_type() -> None:
    with pytest.raises(InvalidArgumentError, match="pair of ints, got a value of type list"):
        Geometry.from_arguments(stride=cast("Any", [10**5000] * 3))


@pytest.mark.parametrize("shape", [(), [2, 3], range(64), (np.int64(7),), np.arange(3)], ids=repr)
def test_a_sequence_of_at_most_64_ints_has_sizes(shape: Any) -> None:
    assert parse_sizes(shape) == tuple(map(int, shape))
    assert parse_sizes(iter(shape)) == tuple(map(int, shape))


@pytest.mark.parametrize(
    "shape",
    [
        5,
        None,
        "ab",
        b"ab",
        {1, 2},
        {1: 2},
        range(65),
        itertools.count(),
        [1.5],
        [None],
        np.array(3),
    ],
    ids=repr,
)
def test_nothing_else_has_sizes(shape: Any) -> None:
    assert parse_sizes(shape) is None


def test_errors_show_two_hundred_letters_of_a_value() -> None:
    assert shorten("a" * 198) == f"'{'a' * 198}'"
    assert shorten("a" * 199) == f"'{'a' * 199}..."
    assert shorten([1, 2]) == "[1, 2]"
