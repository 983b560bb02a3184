"""The shape of a result without a server: as the server computes it, with the same errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deconvd_client import Connection, InvalidArgumentError, output_shape


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "pad": (1, 0)},
        {"stride": (3, 1), "outsize": (None, 9)},
        {"dilate": (1, 2), "groups": np.int64(2)},
    ],
    ids=str,
)
def test_it_is_the_shape_of_the_result(F: Connection, arguments: dict[str, Any]) -> None:
    x, W = np.ones((2, 4, 5, 6), np.float32), np.ones((4, 3, 3, 4), np.float32)

    shape = output_shape(x.shape, W.shape, **arguments)

    assert shape == F.deconvolution_2d(x, W, **arguments).shape
    assert list(map(type, shape)) == [int] * 4


def test_sizes_may_be_any_integers() -> None:
    assert output_shape(np.array([1, 2, 3, 4]), [np.uint8(2), 5, 1, 1]) == (1, 5, 3, 4)  # type: ignore[arg-type]  # arrays, too


@pytest.mark.parametrize(
    ("x_shape", "W_shape", "arguments", "argument"),
    [
        ((1, 4, 5, 5), (3, 1, 3, 3), {}, "W"),
        ((1, 4, 5, 5), (4, 1, 3, 3), {"groups": 3}, "groups"),
        ((1, 4, 5, 5), (4, 1, 3, 3), {"stride": 0}, "stride"),
        ((1, 4, 5, 5), (4, 1, 3, 3), {"outsize": (9, 9)}, "outsize"),
        ((1, 4, 5, 5), (4, 1, 3, 3), {"pad": 9}, ""),
    ],
)
def test_what_a_call_refuses_is_refused_in_the_same_words(
    F: Connection, x_shape: Any, W_shape: Any, arguments: dict[str, Any], argument: str
) -> None:
    with pytest.raises(InvalidArgumentError) as expected:
        F.deconvolution_2d(np.ones(x_shape), np.ones(W_shape), **arguments)
    with pytest.raises(InvalidArgumentError) as raised:
        output_shape(x_shape, W_shape, **arguments)

    assert str(raised.value) == str(expected.value)
    assert raised.value.argument == expected.value.argument == argument


@pytest.mark.parametrize(
    "shape", [(1, 2, 3), 3, "1234", (1, 2, 3, 4.0), None, np.ones((1, 2, 3, 4))]
)
def test_what_is_no_shape_is_refused(shape: Any) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^x_shape must be four ints, \(n, c_I, h_I, w_I\), got "
    ) as raised:
        output_shape(shape, (4, 1, 3, 3))
    assert raised.value.argument == "x_shape"
    with pytest.raises(InvalidArgumentError, match="W_shape must be four ints"):
        output_shape((1, 2, 3, 4), shape)


def test_negative_and_huge_sizes_are_refused() -> None:
    for x_shape in ((-1, 4, 5, 5), (2**31, 4, 5, 5)):
        with pytest.raises(InvalidArgumentError, match="x: each dimension must be from 0 to"):
            output_shape(x_shape, (4, 1, 3, 3))


def test_a_keyword_of_another_library_suggests_ours() -> None:
    shape: Any = output_shape
    with pytest.raises(TypeError, match="did you mean 'pad' for 'padding'"):
        shape((1, 4, 5, 5), (4, 1, 3, 3), padding=1)


@pytest.mark.parametrize("size", [10**100, 10**5000], ids=["long", "too long to be shown"])
def test_a_size_of_any_length_is_refused(size: int) -> None:
    with pytest.raises(InvalidArgumentError, match="x_shape must be four ints") as raised:
        output_shape((1, 2, size, 3), (2, 3, 3, 3))

    assert len(str(raised.value)) < 300
