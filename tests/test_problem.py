"""A problem: what its operands must look like, what follows from them, and the words for what does not fit."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, fields
from typing import Literal

import numpy as np
import pytest
from hypothesis import given

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, ELEMENT_TYPES, DType
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec, check_extents, problem_of
from tests.strategies import problems

F32 = np.dtype(np.float32)
X = TensorSpec((2, 6, 4, 5), F32)
W = TensorSpec((6, 2, 3, 1), F32)


def spec(*shape: int, dtype: DType = F32) -> TensorSpec:
    return TensorSpec(shape, dtype)


def test_a_problem_knows_its_sizes() -> None:
    problem = Problem(X, W, Geometry(stride=(2, 3), groups=3))

    assert (problem.n, problem.c_I, problem.c_O, problem.groups) == (2, 6, 6, 3)
    assert (problem.image, problem.kernel, problem.output) == ((4, 5), (3, 1), (9, 13))
    assert problem.y == spec(2, 6, 9, 13)
    assert problem.b == spec(6)


def test_a_problem_cannot_be_changed_and_shows_what_it_is_alone() -> None:
    problem = Problem(X, W, Geometry())

    for field in fields(problem):
        with pytest.raises(FrozenInstanceError):
            setattr(problem, field.name, getattr(problem, field.name))
    assert repr(problem) == (
        f"Problem(x={X!r}, W={W!r}, geometry={Geometry()!r}, "
        f"output={problem.output!r}, y={problem.y!r})"
    )


def test_a_problem_is_made_once_for_calls_that_repeat_it() -> None:
    assert problem_of(X, W, Geometry()) is problem_of(X, W, Geometry())
    assert problem_of(X, W, Geometry()) == Problem(X, W, Geometry())


def test_products_have_the_wider_type_of_both_operands_and_at_least_float32() -> None:
    half, double = np.dtype(np.float16), np.dtype(np.float64)
    halves = Problem(spec(*X.shape, dtype=half), spec(*W.shape, dtype=half), Geometry())
    mixed = Problem(X, spec(*W.shape, dtype=double), Geometry())

    assert (halves.compute_type, mixed.compute_type) == (F32, double)


@pytest.mark.parametrize("order", ["<", ">"])
def test_raw_elements_are_little_endian(order: Literal["<", ">"]) -> None:
    shape = (2, 3)

    raw = TensorSpec(shape, F32.newbyteorder(order)).raw

    assert (raw.shape, raw.dtype, raw.nbytes) == (shape, np.dtype("<f4"), 24)


@pytest.mark.parametrize(
    ("dimensions", "shown"),
    [(8, "(0, 1, 2, 3, 4, 5, 6, 7)"), (9, "(0, 1, 2, 3, 4, 5, 6, 7, ...)")],
)
def test_eight_dimensions_are_shown(dimensions: int, shown: str) -> None:
    assert str(spec(*range(dimensions))) == f"float32 of shape {shown}"


@pytest.mark.parametrize("shape", [(2**31 - 1,), (0,), (2**30, 2**30, 4, 1, 0)], ids=str)
def test_an_array_may_have_any_extent_of_31_bits_and_2_to_the_62_bytes(
    shape: tuple[int, ...],
) -> None:
    check_extents("x", spec(*shape, dtype=np.dtype(np.int8)))


@pytest.mark.parametrize("shape", [(2**31,), (-1,), (2**30, 2**30, 5)], ids=str)
def test_no_array_has_more(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        InvalidArgumentError, match="dimension must be from 0 to 2147483647"
    ) as raised:
        check_extents("x", spec(*shape, dtype=np.dtype(np.int8)))

    assert raised.value.argument == "x"


@pytest.mark.parametrize("x", ELEMENT_TYPES, ids=str)
@pytest.mark.parametrize("w", ELEMENT_TYPES, ids=str)
def test_the_result_and_bias_have_the_element_type_of_x(x: DType, w: DType) -> None:
    problem = Problem(TensorSpec(X.shape, x), TensorSpec(W.shape, w), Geometry())

    assert (problem.y.dtype, problem.b.dtype) == (x, x)


@given(problems())
def test_equal_problems_are_one_key(problem: Problem) -> None:
    again = Problem(problem.x, problem.W, problem.geometry)

    assert len({problem, again, copy.copy(problem)}) == 1


@given(problems())
def test_a_problem_takes_the_bias_and_gradient_that_it_describes(problem: Problem) -> None:
    problem.check_b(problem.b)
    problem.check_gy(problem.y)


@pytest.mark.parametrize(
    ("x", "w", "has_products"),
    [
        (spec(1, 1, 1, 1), spec(1, 1, 1, 1), True),
        (spec(0, 1, 1, 1), spec(1, 1, 1, 1), False),
        (spec(1, 0, 1, 1), spec(0, 1, 1, 1), False),
        (spec(1, 1, 1, 1), spec(1, 0, 1, 1), False),
        (spec(1, 1, 0, 1), spec(1, 1, 2, 1), False),
    ],
    ids=str,
)
def test_a_problem_with_an_empty_operand_has_no_products(
    x: TensorSpec, w: TensorSpec, has_products: bool
) -> None:
    problem = Problem(x, w, Geometry(stride=(2, 2), outsize=(1, 1)))

    assert problem.has_products is has_products


@pytest.mark.parametrize(
    ("x", "w", "argument", "message"),
    [
        (spec(6, 4, 5), W, "x", "x must have 4 dimensions, got 3: float32 of shape (6, 4, 5)"),
        (X, spec(6, 2, 3), "W", "W must have 4 dimensions, got 3: float32 of shape (6, 2, 3)"),
        (spec(*range(99)), W, "x", "x must have 4 dimensions, got 99: float32 of shape (0, 1, 2"),
        (spec(2, 6, 4, 5, dtype=np.dtype("i4")), W, "x", "x must have one of the element types"),
        (X, spec(6, 2, 3, 1, dtype=np.dtype("c8")), "W", "W must have one of the element types"),
        (spec(2, 6, -4, 5), W, "x", "x: each dimension must be from 0 to 2147483647"),
        (spec(2**31, 6, 1, 1), W, "x", "x: each dimension must be from 0 to 2147483647"),
        (spec(2**30, 6, 2**30, 5), W, "x", "x: each dimension must be from 0 to 2147483647"),
        (
            spec(0, 6, 2**31 - 1, 2**31 - 1),
            W,
            "x",
            "x: each dimension must be from 0 to 2147483647",
        ),
        (spec(2, 5, 4, 5), W, "W", "W must have as many input channels, W.shape[0], as x has"),
    ],
    ids=range(10),
)
def test_operands_that_no_problem_has_are_refused(
    x: TensorSpec, w: TensorSpec, argument: str, message: str
) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Problem(x, w, Geometry())

    assert str(raised.value).startswith(message)
    assert raised.value.argument == argument
    assert len(str(raised.value)) < 250


def test_channels_that_disagree_are_shown_for_both_operands() -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Problem(X, spec(5, 2, 3, 1), Geometry())

    assert str(raised.value) == (
        "W must have as many input channels, W.shape[0], as x has, x.shape[1]: "
        "got W.shape (5, 2, 3, 1) for x.shape (2, 6, 4, 5)"
    )


def test_groups_must_divide_the_input_channels() -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        Problem(X, W, Geometry(groups=4))

    assert str(raised.value) == "groups must divide the number of input channels, 6, got 4"
    assert raised.value.argument == "groups"


def test_an_output_too_large_for_any_machine_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match="y: each dimension must be from 0 to 2147483647, and"
    ):
        Problem(spec(8, 1, 2, 2), spec(1, 1, 1, 1), Geometry(stride=(2**30, 2**30)))


@pytest.mark.parametrize(
    ("b", "message"),
    [
        (spec(1, 6), "b must have 1 dimension, got 2: float32 of shape (1, 6)"),
        (
            spec(5),
            "b must have c_O elements of x's element type: float32 of shape (6), "
            "got float32 of shape (5)",
        ),
        (
            spec(6, dtype=BFLOAT16),
            "b must have c_O elements of x's element type: float32 of shape (6), "
            "got bfloat16 of shape (6)",
        ),
    ],
    ids=range(3),
)
def test_another_bias_is_refused(b: TensorSpec, message: str) -> None:
    problem = Problem(X, W, Geometry(groups=3))

    with pytest.raises(InvalidArgumentError) as raised:
        problem.check_b(b)

    assert (str(raised.value), raised.value.argument) == (message, "b")


@pytest.mark.parametrize(
    ("gy", "message"),
    [
        (spec(2, 6, 6), "gy must have 4 dimensions, got 3: float32 of shape (2, 6, 6)"),
        (
            spec(2, 6, 6, 4),
            "gy must have the shape and element type of the output: "
            "float32 of shape (2, 6, 6, 5), got float32 of shape (2, 6, 6, 4)",
        ),
        (
            spec(2, 6, 6, 5, dtype=np.dtype(np.float64)),
            "gy must have the shape and element type of the output: "
            "float32 of shape (2, 6, 6, 5), got float64 of shape (2, 6, 6, 5)",
        ),
    ],
    ids=range(3),
)
def test_another_gradient_is_refused(gy: TensorSpec, message: str) -> None:
    problem = Problem(X, W, Geometry(groups=3))

    with pytest.raises(InvalidArgumentError) as raised:
        problem.check_gy(gy)

    assert (str(raised.value), raised.value.argument) == (message, "gy")
