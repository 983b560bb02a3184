"""Element types: which there are, in which byte orders, and which type products are taken in."""

from __future__ import annotations

import numpy as np
import pytest

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, ELEMENT_TYPES, DType, compute_type, element_type


@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_each_element_type_is_itself(dtype: DType) -> None:
    assert element_type("x", dtype) == dtype


@pytest.mark.parametrize("name", ["f2", "f4", "f8"])
def test_byte_order_does_not_change_the_element_type(name: str) -> None:
    native = element_type("x", np.dtype(f">{name}"))

    assert native == element_type("x", np.dtype(f"<{name}")) == np.dtype(name)
    assert native.isnative


@pytest.mark.parametrize("name", ["i4", "?", "c8", "S4", "O", "V2", "f4,f4", "M8[s]"])
def test_another_type_is_refused_with_those_allowed(name: str) -> None:
    dtype = np.dtype(name)

    with pytest.raises(InvalidArgumentError) as raised:
        element_type("W", dtype)

    allowed = "float16, bfloat16, float32, float64"
    assert str(raised.value) == f"W must have one of the element types {allowed}, got {dtype}"
    assert raised.value.argument == "W"


@pytest.mark.parametrize("x", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("W", ELEMENT_TYPES, ids=str)
def test_products_are_taken_in_float64_if_either_operand_has_it_and_else_in_float32(
    x: DType, W: DType
) -> None:
    assert compute_type(x, W) == max(x, W, np.dtype(np.float32), key=lambda dtype: dtype.itemsize)


def test_element_types_are_sorted_by_what_they_hold() -> None:
    assert [dtype.name for dtype in ELEMENT_TYPES] == ["float16", "bfloat16", "float32", "float64"]
    assert BFLOAT16.itemsize == 2
