"""Operands that are lists, numbers and objects with `__array__`: what numpy makes of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow
import pytest
from PIL import Image

from deconvd.model.dtypes import BFLOAT16, Array
from deconvd_client import Connection, InvalidArgumentError

random = np.random.default_rng(0)
X = random.standard_normal((2, 4, 5, 6))
W = random.standard_normal((4, 2, 3, 3))
B = random.standard_normal(2)
GY = random.standard_normal((2, 2, 7, 8))


class Held:
    """What an object of another library is: numpy sees its elements by `__array__` alone."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __repr__(self) -> str:
        return f"Held({self._array!r})"

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self._array


def as_tuples(array: Array) -> Any:
    return tuple(map(as_tuples, array)) if array.ndim else float(array)


def list_of_arrays(array: Array) -> list[Array]:
    return [*array]


KINDS: dict[str, Callable[[Array], Any]] = {
    "list": np.ndarray.tolist,
    "tuples": as_tuples,
    "list of arrays": list_of_arrays,
    "__array__": Held,
    "a memory map's subclass": lambda array: Held(array.view(np.memmap)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_function_takes_them_and_returns_numpy_arrays(F: Connection, kind: str) -> None:
    x, w, b, gy = map(KINDS[kind], (X, W, B, GY))
    y = F.deconvolution_2d(X, W, B)
    gradients = F.deconvolution_2d_grad(X, W, B, GY)
    found, pullback = F.vjp(x, w, b)
    kept = F.remote.deconvolution_2d_grad(x, w, b, gy)

    for result in (F.deconvolution_2d(x, w, b), found, F.remote.deconvolution_2d(x, w, b).numpy()):
        assert type(result) is np.ndarray
        np.testing.assert_array_equal(result, y)
    for three in (
        F.deconvolution_2d_grad(x, w, b, gy),
        pullback(gy),
        [k and k.numpy() for k in kept],
    ):
        for ours, theirs in zip(three, gradients, strict=True):
            assert type(ours) is np.ndarray
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(F.put(x).numpy(), X)


def test_an_array_of_another_library_is_a_bias(F: Connection) -> None:
    b = B.astype(np.float32)
    x, w = X.astype(np.float32), W.astype(np.float32)

    y = F.deconvolution_2d(x, w, pyarrow.array(b))

    np.testing.assert_array_equal(y, F.deconvolution_2d(x, w, b))


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1.5, np.float64),
        ([1.5], np.float64),
        (np.float32(1.5), np.float32),
        ([np.float32(1.5)], np.float32),
        (BFLOAT16.type(1.5), BFLOAT16),
        ([], np.float64),
    ],
    ids=repr,
)
def test_the_elements_have_the_type_that_numpy_gives_them(
    F: Connection, value: Any, dtype: Any
) -> None:
    there = F.put(value).numpy()

    assert there.dtype == dtype
    np.testing.assert_array_equal(there, np.asarray(value, dtype))


@pytest.mark.parametrize(
    ("value", "given"),
    [
        ([1, 2], "got int64 in list: convert it with numpy.asarray(array, numpy.float32)"),
        (True, "got bool in bool: convert it with numpy.asarray(array, numpy.float32)"),
        ((np.uint8(1),), "got uint8 in tuple: convert it with numpy.asarray(array, numpy.float32)"),
        (
            np.int32(1),
            "got int32 in numpy.int32: convert it with numpy.asarray(array, numpy.float32)",
        ),
        (1j, "got complex128 in complex"),
        (["1.5"], "got <U3 in list"),
        ([None], "got object in list"),
        (Held(np.array([None])), "got object in tests.test_array_conversion.Held"),
        ([np.datetime64("2026-01-01")], "got datetime64[D] in list"),
    ],
    ids=str,
)
def test_elements_of_other_types_are_refused_with_a_remedy_if_nothing_is_lost(
    F: Connection, value: Any, given: str
) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        F.put(value)

    assert str(raised.value) == (
        f"array must have one of the element types float16, bfloat16, float32, float64, {given}"
    )
    assert raised.value.argument == "array"


def cyclic() -> list[Any]:
    values: list[Any] = []
    values.append(values)
    return values


@pytest.mark.parametrize("value", [[[1.0], [1.0, 2.0]], [1.0, [2.0]], cyclic()], ids=str)
def test_ragged_lists_are_refused(F: Connection, value: Any) -> None:
    with pytest.raises(
        InvalidArgumentError, match="W must be an array, or nested lists of one shape: "
    ) as raised:
        F.deconvolution_2d(X, value)

    assert raised.value.argument == "W"


@pytest.mark.parametrize(
    "value",
    [
        Held(np.ma.masked_greater(B, 0)),
        [np.ma.masked_greater(B, 0)],
        [[[1.0, np.ma.masked]]],
        np.ma.masked,
    ],
    ids=["__array__", "list", "nested", "the masked element"],
)
def test_no_mask_is_lost_on_the_way(F: Connection, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^b must not be a masked array"):
        F.deconvolution_2d(X, W, value)


class Photograph(Image.Image):
    """A user's own image."""


@pytest.mark.parametrize("image", [Photograph(), [Image.new("F", (8, 8))]], ids=["own", "list"])
def test_images_are_refused_in_lists_and_as_subclasses(F: Connection, image: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"x must be .* a PIL image \("):
        F.deconvolution_2d(image, W)


@pytest.mark.parametrize(
    ("module", "kind", "remedy"),
    [
        (
            "chainerx",
            "ndarray",
            "a ChainerX array (ndarray): convert it with chainerx.to_numpy(gy)",
        ),
        (
            "ideep4py._ideep4py",
            "mdarray",
            "an iDeep array (mdarray): convert it with numpy.array(gy)",
        ),
    ],
)
def test_arrays_of_chainers_other_backends_are_refused_in_a_line(
    F: Connection, module: str, kind: str, remedy: str
) -> None:
    gy: Any = type(kind, (Held,), {"__module__": module})(GY)

    with pytest.raises(InvalidArgumentError) as raised:
        F.deconvolution_2d_grad(X, W, B, gy)

    assert str(raised.value).endswith(f"got {remedy}")


class Failing:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise self._error


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), ValueError("mine"), OSError("mine")])
def test_what_goes_wrong_in_a_users_array_method_comes_out_as_itself(
    F: Connection, error: Exception
) -> None:
    x: Any = Failing(error)

    with pytest.raises(type(error), match="mine") as raised:
        F.deconvolution_2d(x, W)

    assert raised.value is error
    assert error.__notes__ == ["This happened while numpy made an array of the argument x."]


def test_an_array_method_that_returns_no_array_is_named(F: Connection) -> None:
    x: Any = Held([1.0])

    with pytest.raises(ValueError, match="not producing an array") as raised:
        F.deconvolution_2d(x, W)

    assert raised.value.__notes__ == ["This happened while numpy made an array of the argument x."]


def test_a_list_that_was_put_may_be_changed_afterwards(F: Connection) -> None:
    values = [1.0, 2.0]
    there = F.put(values)
    values[0] = 3.0

    np.testing.assert_array_equal(there.numpy(), [1.0, 2.0])
