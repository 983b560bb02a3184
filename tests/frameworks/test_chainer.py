"""A connection's functions take Variables and return Variables, with gradients of any order, equal to Chainer's own."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import chainer
import numpy as np
import pytest
from chainer import gradient_check
from chainer.utils.type_check import InvalidType

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array, DType
from deconvd_client import Connection

DTYPES = [np.dtype(name) for name in ("float16", "float32", "float64")]
NAMES = ("x", "W", "b")


@dataclass(frozen=True)
class Case:
    """A case like those of Chainer's own tests."""

    x_dtype: DType
    W_dtype: DType
    stride: tuple[int, int]
    pad: tuple[int, int]
    outsize: str
    has_b: bool
    dilate: tuple[int, int]
    groups: int
    order: str

    def __str__(self) -> str:
        words = [self.x_dtype, self.W_dtype, self.stride, self.pad, self.outsize, self.has_b]
        return "-".join(map(str, [*words, self.dilate, self.groups, self.order]))

    @property
    def keywords(self) -> dict[str, Any]:
        """The arguments beside x, W and b, for an x of 4 × 3 pixels and a W of 3 × 2 taps."""
        natural = [
            s * (i - 1) + d * (k - 1) + 1 - 2 * p
            for i, k, s, p, d in zip(
                (4, 3), (3, 2), self.stride, self.pad, self.dilate, strict=True
            )
        ]
        spare = [s - 1 for s in self.stride]
        outsize = {
            "none": None,
            "natural": tuple(natural),
            "larger": tuple(n + s for n, s in zip(natural, spare, strict=True)),
        }
        return {
            "stride": self.stride,
            "pad": self.pad,
            "outsize": outsize[self.outsize],
            "dilate": self.dilate,
            "groups": self.groups,
        }

    def arrays(self) -> list[Array]:
        """Return x, W and, if there is one, b, in this case's order of memory."""
        generator = np.random.default_rng(len(str(self)))
        shapes = [(2, 3 * self.groups, 4, 3), (3 * self.groups, 2, 3, 2), (2 * self.groups,)]
        dtypes = [self.x_dtype, self.W_dtype, self.x_dtype]
        return [
            self._in_order(generator.uniform(-1, 1, shape).astype(dtype))
            for shape, dtype in zip(shapes[: 2 + self.has_b], dtypes, strict=False)
        ]

    def like(self, variables: list[Any], seed: int) -> list[Array]:
        """Return other arrays of the variables' shapes and element types."""
        generator = np.random.default_rng(seed)
        return [generator.uniform(-1, 1, v.shape).astype(v.dtype) for v in variables]

    def _in_order(self, array: Array) -> Array:
        if self.order == "C":
            return array
        wide = np.zeros([2 * extent for extent in array.shape], array.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in array.shape)]
        view[...] = array
        return view

    def tolerance(self, kind: str) -> dict[str, Any]:
        """Return Chainer's own tolerance for y, for gradients, or for double backward."""
        if self.x_dtype == np.float16 or (self.W_dtype == np.float16 and kind != "y"):
            return {"atol": 5e-3, "rtol": 5e-2}
        if kind == "double":
            return {"atol": 1e-4, "rtol": 1e-3}
        return {"atol": 1e-5, "rtol": 1e-4}


def all_cases() -> Iterator[Case]:
    values: list[list[Any]] = [
        *(DTYPES, DTYPES),
        *([(1, 1), (2, 2), (3, 2)], [(0, 0), (1, 0)]),
        *(["none", "natural", "larger"], [False, True]),
        *([(1, 1), (2, 1)], [1, 2], ["C", "strided"]),
    ]
    for chosen in itertools.product(*values):
        yield Case(*chosen)


def covering_cases() -> list[Case]:
    """Return so many of the cases that every three values of different fields meet in one of them."""
    shuffled = [*all_cases()]
    random.Random(0).shuffle(shuffled)
    met: set[Any] = set()
    cases = []
    for case in shuffled:
        values = enumerate(vars(case).values())
        triples = {*itertools.combinations(((i, str(value)) for i, value in values), 3)}
        if not triples <= met:
            met |= triples
            cases.append(case)
    return cases


CASES = covering_cases()
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


def variables_of(case: Case) -> list[Any]:
    return [chainer.Variable(array) for array in case.arrays()]


@EVERY_CASE
def test_results_and_gradients_of_both_orders_are_chainers(F: Connection, case: Case) -> None:
    found, expected = (
        differentiate_twice(function, case)
        for function in (F.deconvolution_2d, chainer.functions.deconvolution_2d)
    )

    for kind, results in expected.items():
        for mine, chainers in zip(found[kind], results, strict=True):
            assert mine.dtype == chainers.dtype
            np.testing.assert_allclose(mine, chainers, **case.tolerance(kind), err_msg=kind)


def differentiate_twice(function: Any, case: Case) -> dict[str, list[Array]]:
    """Return y, its gradients for some gy, and their gradients: arrays by the kind of result."""
    inputs = variables_of(case)
    y = function(*inputs, **case.keywords)
    gy = chainer.Variable(*case.like([y], seed=1))
    gradients = chainer.grad([y], inputs, [gy], enable_double_backprop=True)
    second_inputs = [*inputs[:2], gy]
    second = chainer.grad(
        gradients, second_inputs, [*map(chainer.Variable, case.like(gradients, seed=2))]
    )
    kinds = {"y": [y], "gradients": gradients, "double": second}
    return {kind: [variable.array for variable in results] for kind, results in kinds.items()}


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_gradients_of_both_orders_agree_with_differences(F: Connection, case: Case) -> None:
    def function(*inputs: Any) -> Any:
        return F.deconvolution_2d(*inputs, **case.keywords)

    inputs = tuple(case.arrays())
    gy = case.like([function(*variables_of(case))], seed=1)
    ggs = tuple(case.like([*inputs], seed=2))
    backward, double = (
        {"dtype": np.float64, **case.tolerance(kind)} for kind in ("gradients", "double")
    )

    gradient_check.check_backward(function, inputs, tuple(gy), **backward)
    gradient_check.check_double_backward(function, inputs, tuple(gy), ggs, **double)


EVERY_SUBSET = pytest.mark.parametrize(
    "needed", [s for n in (1, 2, 3) for s in itertools.combinations(NAMES, n)], ids=str
)


def one_case() -> list[Any]:
    generator = np.random.default_rng(0)
    shapes = [(2, 4, 3, 5), (4, 3, 2, 2), (3,)]
    return [generator.uniform(-1, 1, shape).astype(np.float32) for shape in shapes]


def record_wanted(patch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Note which gradients the server is asked for."""
    wanted: list[tuple[str, ...]] = []
    ask = Connection.deconvolution_2d_grad

    def note(self: Connection, *args: Any, **keywords: Any) -> Any:
        wanted.append(keywords.get("wanted", ()))
        return ask(self, *args, **keywords)

    patch.setattr(Connection, "deconvolution_2d_grad", note)
    return wanted


@EVERY_SUBSET
def test_only_the_gradients_that_are_needed_are_computed(
    F: Connection, needed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = record_wanted(monkeypatch)
    inputs = [
        chainer.Variable(array, requires_grad=name in needed)
        for name, array in zip(NAMES, one_case(), strict=True)
    ]

    y: Any = F.deconvolution_2d(*inputs)
    gy = np.ones(y.shape, np.float32)
    y.grad = gy
    y.backward()

    monkeypatch.undo()
    assert wanted == [tuple(f"g{name}" for name in needed)]
    x, W, b = one_case()
    full: Any = F.deconvolution_2d_grad(x, W, b, gy)
    for name, variable, gradient in zip(NAMES, inputs, full, strict=True):
        if name in needed:
            np.testing.assert_allclose(variable.grad, gradient, 1e-5)
        else:
            assert variable.grad is None


@EVERY_SUBSET
def test_each_gradient_alone_can_be_differentiated(F: Connection, needed: tuple[str, ...]) -> None:
    x, W, b = map(chainer.Variable, one_case())
    y = F.deconvolution_2d(x, W, b, stride=2)
    gy = chainer.Variable(np.random.default_rng(1).uniform(-1, 1, y.shape).astype(np.float32))

    def second(value: Any, asked: tuple[str, ...]) -> list[Array | None]:
        variables = [{"x": x, "W": W, "b": b}[name] for name in asked]
        gradients = chainer.grad([value], variables, [gy], enable_double_backprop=True)
        total = sum(
            chainer.functions.sum(gradient**2)
            for name, gradient in zip(asked, gradients, strict=True)
            if name in needed
        )
        return [None if g is None else g.array for g in chainer.grad([total], [x, W, b, gy])]

    # Chainer itself crashes if gx is not asked for
    expected = second(chainer.functions.deconvolution_2d(x, W, b, stride=2), NAMES)
    for mine, chainers in zip(second(y, needed), expected, strict=True):
        if chainers is None:
            assert mine is None or not mine.any()
        else:
            assert mine is not None
            np.testing.assert_allclose(mine, chainers, 1e-3, 1e-3)


def test_a_third_derivative_is_chainers(F: Connection) -> None:
    def third(function: Any) -> list[Array]:
        x, W, b = map(chainer.Variable, one_case())
        value = chainer.functions.sum(function(x, W, b, stride=2) ** 4)
        for _ in range(2):
            gradients = chainer.grad([value], [x, W, b], enable_double_backprop=True)
            value = sum(chainer.functions.sum(gradient**2) for gradient in gradients)
        return [g.array for g in chainer.grad([value], [x, W, b])]

    for mine, chainers in zip(
        third(F.deconvolution_2d), third(chainer.functions.deconvolution_2d), strict=True
    ):
        np.testing.assert_allclose(mine, chainers, rtol=1e-3)


def test_a_gradient_of_W_alone_works_where_chainer_crashes(F: Connection) -> None:
    x, W, _ = one_case()
    variable = chainer.Parameter(W)

    chainer.functions.sum(F.deconvolution_2d(x, variable)).backward()

    gy = np.ones((2, 3, 4, 6), np.float32)
    expected = F.deconvolution_2d_grad(x, W, None, gy, wanted=("gW",)).gW
    np.testing.assert_array_equal(variable.grad, expected)


@pytest.mark.parametrize("position", range(3))
def test_one_variable_among_arrays_makes_the_result_a_variable(
    F: Connection, position: int
) -> None:
    operands = one_case()
    plain = F.deconvolution_2d(*operands)
    operands[position] = chainer.Variable(operands[position])

    y = F.deconvolution_2d(*operands)

    assert isinstance(plain, np.ndarray)
    assert isinstance(y, chainer.Variable)
    np.testing.assert_array_equal(y.array, plain)


def test_variables_that_need_no_gradient_record_nothing(F: Connection) -> None:
    variables = [*map(chainer.Variable, one_case())]
    frozen: Any = F.deconvolution_2d(
        *(chainer.Variable(array, requires_grad=False) for array in one_case())
    )
    with chainer.no_backprop_mode():
        unrecorded: Any = F.deconvolution_2d(*variables)
    y: Any = F.deconvolution_2d(*variables)

    assert not frozen.requires_grad
    assert unrecorded.creator is None
    assert y.requires_grad
    assert y.creator is not None


def test_gradients_that_are_asked_for_are_variables_with_gradients_of_their_own(
    F: Connection,
) -> None:
    x, W, b = map(chainer.Variable, one_case())
    gy = chainer.Variable(np.random.default_rng(1).uniform(-1, 1, (2, 3, 4, 6)).astype(np.float32))

    gradients: Any = F.deconvolution_2d_grad(x, W, b, gy)
    only: Any = F.deconvolution_2d_grad(x, W, b, gy, wanted=["gW"])
    y = chainer.functions.deconvolution_2d(x, W, b)
    expected = chainer.grad([y], [x, W, b], [gy], enable_double_backprop=True)

    assert (only.gx, only.gb) == (None, None)
    for mine, chainers in zip([*gradients, only.gW], [*expected, expected[1]], strict=True):
        np.testing.assert_allclose(mine.array, chainers.array, 1e-4, 1e-5)
    mine, chainers = (
        chainer.grad([chainer.functions.sum(gW**2)], [x, gy]) for gW in (gradients.gW, expected[1])
    )
    for one, other in zip(mine, chainers, strict=True):
        np.testing.assert_allclose(one.array, other.array, 1e-4, 1e-4)


def test_other_functions_take_the_elements_of_variables(F: Connection) -> None:
    x, W, b = one_case()
    y, pullback = F.vjp(chainer.Variable(x), chainer.Parameter(W), chainer.Variable(b))

    assert isinstance(y, chainer.Variable)
    assert y.creator is None
    np.testing.assert_array_equal(y.array, F.deconvolution_2d(x, W, b))
    assert isinstance(pullback(y).gx, chainer.Variable)
    np.testing.assert_array_equal(F.put(chainer.Variable(x)).numpy(), x)
    pullback.close()


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"W": np.ones((3, 3, 2, 2), np.float32)}, "W"),
        ({"x": np.ones((2, 4, 3), np.float32)}, "x"),
        ({"b": np.ones(2, np.float32)}, "b"),
        ({"outsize": (40, 40)}, "outsize"),
        ({"W": [[1.0]]}, "W"),
        ({"W": chainer.Parameter(0)}, "W"),
    ],
    ids=["channels", "dimensions", "b", "outsize", "list", "uninitialized"],
)
def test_errors_are_chainers_too(F: Connection, change: dict[str, Any], argument: str) -> None:
    x, W, b = one_case()
    arguments = {"x": x, "W": W, "b": b} | change
    if isinstance(arguments["x"], np.ndarray):
        arguments["x"] = chainer.Variable(arguments["x"])

    with pytest.raises(InvalidType) as raised:
        F.deconvolution_2d(**arguments)

    error: Any = raised.value
    assert {InvalidArgumentError, ValueError} <= {*type(error).__mro__}
    assert error.argument == argument
    assert error.expect
    assert error.actual
    assert str(error).startswith(error.expect)
    assert str(error).endswith(error.actual)


def test_an_uninitialized_parameter_is_refused_elsewhere(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match="must not be a Parameter without elements"):
        F.put(chainer.Parameter(0))
