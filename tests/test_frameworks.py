"""Frameworks at the edge: every function takes arrays of one that is registered, and answers in kind."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd_client import Connection, InvalidArgumentError
from deconvd_client.frameworks import framework
from deconvd_client.frameworks.framework import Framework, framework_of, host_array
from tests.fake_framework import (
    FakeCardTensor,
    FakeFramework,
    FakeTensor,
    FakeTracer,
    FakeTracingFramework,
)

fake: Callable[..., Any] = FakeTensor
"""Makes a tensor of a framework that type checkers do not know."""

random = np.random.default_rng(0)
X = random.standard_normal((2, 3, 8, 8), np.float32)
W = random.standard_normal((3, 2, 3, 3), np.float32)
B = random.standard_normal(2, np.float32)
GY = random.standard_normal((2, 2, 10, 10), np.float32)


@contextmanager
def registered(open_framework: Callable[[], Framework]) -> Iterator[None]:
    framework.register("tests", open_framework)
    try:
        yield
    finally:
        del framework._openers["tests"]
        framework._framework_of_type.cache_clear()


@pytest.fixture
def opened() -> Iterator[list[FakeFramework]]:
    """The stand-in is registered; what is opened of it, one after another."""
    found: list[FakeFramework] = []

    def open_framework() -> FakeFramework:
        found.append(FakeFramework())
        return found[-1]

    with registered(open_framework):
        yield found


@pytest.fixture
def tracing() -> Iterator[FakeTracingFramework]:
    """The stand-in that traces is registered."""
    found = FakeTracingFramework()
    with registered(lambda: found):
        yield found


def elements(tensor: object) -> Array:
    assert isinstance(tensor, FakeTensor)
    return np.from_dlpack(tensor)


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_results_are_of_the_kind_of_x_and_on_its_device(
    F: Connection, opened: list[FakeFramework]
) -> None:
    x: Any = FakeTensor(X, "there")
    y: Any = F.deconvolution_2d(x, fake(W), fake(B))
    gradients: Any = F.deconvolution_2d_grad(x, W, B, fake(GY))

    np.testing.assert_array_equal(elements(y), F.deconvolution_2d(X, W, B))
    assert_same(map(elements, gradients), F.deconvolution_2d_grad(X, W, B, GY))
    assert {y.device, *(gradient.device for gradient in gradients)} == {"there"}


def test_operands_are_made_into_arrays_once(F: Connection, opened: list[FakeFramework]) -> None:
    x: Any = FakeTensor(X)
    F.deconvolution_2d(x, fake(W))
    F.deconvolution_2d_grad(x, W, None, GY, wanted=["gx"])

    assert [framework.arrays_count for framework in opened] == [3]


def test_gradients_that_are_not_wanted_stay_none(
    F: Connection, opened: list[FakeFramework]
) -> None:
    x: Any = FakeTensor(X)
    gradients = F.deconvolution_2d_grad(x, W, None, GY, wanted=["gx"])
    expected = F.deconvolution_2d_grad(X, W, None, GY, wanted=["gx"])

    assert gradients.gW is gradients.gb is None
    np.testing.assert_array_equal(elements(gradients.gx), expected.gx)


def test_with_another_x_the_results_are_numpys(F: Connection, opened: list[FakeFramework]) -> None:
    w: Any = FakeTensor(W)
    for x in (X, F.put(X)):
        y = F.deconvolution_2d(x, w)
        assert isinstance(y, np.ndarray)
        np.testing.assert_array_equal(y, F.deconvolution_2d(X, W))


def test_a_gradient_of_a_remote_tensor_is_numpys_though_all_that_is_sent_is_on_a_card(
    F: Connection, opened: list[FakeFramework]
) -> None:
    gy: Any = FakeCardTensor(GY)
    gradients = F.deconvolution_2d_grad(F.put(X), W, None, gy, wanted=["gx"])

    assert isinstance(gradients.gx, np.ndarray)
    expected = F.deconvolution_2d_grad(X, W, None, GY, wanted=["gx"])
    np.testing.assert_array_equal(gradients.gx, expected.gx)


@pytest.mark.parametrize("kind", [FakeTensor, FakeCardTensor])
def test_what_stays_on_the_server_may_be_made_of_them(
    F: Connection, opened: list[FakeFramework], kind: Callable[[Array], Any]
) -> None:
    expected = F.deconvolution_2d(X, W, B)
    gradients = F.deconvolution_2d_grad(X, W, B, GY)

    with F.put(kind(X)) as there:
        np.testing.assert_array_equal(there.numpy(), X)
        np.testing.assert_array_equal(F.deconvolution_2d(there, kind(W), kind(B)), expected)
    remote = F.remote.deconvolution_2d(kind(X), kind(W), kind(B))
    np.testing.assert_array_equal(remote.numpy(), expected)
    there_too = F.remote.deconvolution_2d_grad(kind(X), kind(W), kind(B), kind(GY))
    assert_same((tensor.numpy() for tensor in there_too if tensor is not None), gradients)


def test_a_pullback_answers_in_the_kind_of_what_it_is_given(
    F: Connection, opened: list[FakeFramework]
) -> None:
    x: Any = FakeTensor(X)
    gy: Any = FakeTensor(GY, "elsewhere")
    y, pullback = F.vjp(x, W, B)
    expected = F.deconvolution_2d_grad(X, W, B, GY)

    np.testing.assert_array_equal(elements(y), F.deconvolution_2d(X, W, B))
    gradients: Any = pullback(gy)
    assert_same(map(elements, gradients), expected)
    assert {gradient.device for gradient in gradients} == {"elsewhere"}
    assert_same(pullback(GY), expected)


def test_elements_on_the_host_are_shared_and_those_on_a_card_copied_once(
    F: Connection, opened: list[FakeFramework]
) -> None:
    on_card: Any = FakeCardTensor(X)
    F.put(on_card)

    assert on_card.copies_count == 1
    assert opened[0].arrays_count == 1
    assert host_array(X) is X
    assert np.shares_memory(FakeFramework().to_array(FakeTensor(X)), X)


def test_arguments_are_checked_as_of_arrays(F: Connection, opened: list[FakeFramework]) -> None:
    x: Any = FakeTensor(X)
    with pytest.raises(InvalidArgumentError, match="input channels"):
        F.deconvolution_2d(x, fake(W[:2]))
    with pytest.raises(InvalidArgumentError, match="x must have 4 dimensions"):
        F.deconvolution_2d(fake(B), W)
    with pytest.raises(InvalidArgumentError, match="int64"):
        F.put(fake(np.arange(3)))


@pytest.mark.parametrize("place", range(3))
def test_a_call_with_a_traced_operand_is_the_frameworks(
    F: Connection, tracing: FakeTracingFramework, place: int
) -> None:
    operands: list[Any] = [X, W, B]
    operands[place] = FakeTracer(operands[place])

    arguments: Any = {"stride": 2, "pad": (0, 1), "outsize": (None, 16), "groups": np.int8(1)}
    y: Any = F.deconvolution_2d(*operands, **arguments)

    geometry = Geometry(stride=(2, 2), pad=(0, 1), outsize=(None, 16))
    assert tracing.records == [("deconvolution_2d", geometry)]
    assert_same([y.array], [F.deconvolution_2d(X, W, B, **arguments)])


@pytest.mark.parametrize("place", range(4))
def test_gradients_of_a_traced_operand_are_the_frameworks(
    F: Connection, tracing: FakeTracingFramework, place: int
) -> None:
    operands: list[Any] = [X, W, B, GY]
    operands[place] = FakeTracer(operands[place])

    gradients: Any = F.deconvolution_2d_grad(*operands, wanted={"gb", "gx"})

    assert tracing.records == [("deconvolution_2d_grad", Geometry(), ("gx", "gb"))]
    expected = F.deconvolution_2d_grad(X, W, B, GY)
    assert gradients.gW is None
    found = [gradients.gx.array, gradients.gb.array]
    assert_same(found, [expected.gx, expected.gb])


def test_what_is_not_traced_is_not_recorded(F: Connection, tracing: FakeTracingFramework) -> None:
    x: Any = FakeTensor(X)
    y: Any = F.deconvolution_2d(x, W, B)
    gradients: Any = F.deconvolution_2d_grad(x, W, B, F.put(GY))

    assert tracing.records == []
    assert_same([elements(y)], [F.deconvolution_2d(X, W, B)])
    assert_same(map(elements, gradients), F.deconvolution_2d_grad(X, W, B, GY))


def test_what_the_server_keeps_has_the_elements_of_a_traced_operand(
    F: Connection, tracing: FakeTracingFramework
) -> None:
    x: Any = FakeTracer(X)
    expected = F.deconvolution_2d(X, W)

    np.testing.assert_array_equal(F.put(x).numpy(), X)
    np.testing.assert_array_equal(F.remote.deconvolution_2d(x, W).numpy(), expected)
    y: Any = F.vjp(x, W)[0]
    np.testing.assert_array_equal(elements(y), expected)
    assert tracing.records == []


def test_an_operand_without_elements_is_refused_by_name(
    F: Connection, tracing: FakeTracingFramework
) -> None:
    tracer: Any = FakeTracer(None)
    calls: dict[str, Callable[[], object]] = {
        "x": lambda: F.remote.deconvolution_2d(tracer, W),
        "W": lambda: F.vjp(X, tracer),
        "gy": lambda: F.vjp(X, W)[1](tracer),
        "array": lambda: F.put(tracer),
    }
    for name, call in calls.items():
        with pytest.raises(
            InvalidArgumentError, match=f"^{name} must not be a tracer: its"
        ) as raised:
            call()
        assert raised.value.argument == name


def test_arguments_of_a_traced_call_are_checked_before_the_framework_has_it(
    F: Connection, tracing: FakeTracingFramework
) -> None:
    x: Any = FakeTracer(X)
    with pytest.raises(InvalidArgumentError, match="stride must"):
        F.deconvolution_2d(x, W, stride=0)
    with pytest.raises(InvalidArgumentError, match="wanted must be a collection of names"):
        F.deconvolution_2d_grad(x, W, B, GY, wanted=["gz"])
    with pytest.raises(InvalidArgumentError, match="gx and gW, as there is no b"):
        F.deconvolution_2d_grad(x, W, None, GY, wanted=["gb"])
    assert tracing.records == []


def test_a_framework_is_opened_by_its_own_arrays_alone(
    F: Connection, opened: list[FakeFramework]
) -> None:
    F.deconvolution_2d(X, W.tolist())
    assert not opened

    class Derived(FakeTensor):
        pass

    for tensor in (FakeTensor(X), Derived(X), FakeTensor(X)):
        assert framework_of(tensor) is not None
    assert len(opened) == 2  # once a type
    assert framework_of(opened) is None


def test_what_a_framework_has_beside_its_arrays_is_refused(
    F: Connection, opened: list[FakeFramework]
) -> None:
    framework: Any = FakeFramework()
    with pytest.raises(InvalidArgumentError, match=r"got tests\.fake_framework\.FakeFramework$"):
        F.deconvolution_2d(framework, W)


def test_a_type_that_only_says_it_is_of_a_framework_imports_none(F: Connection) -> None:
    impostor: Any = type("ndarray", (), {"__module__": "cupy"})()
    if "cupy" in sys.modules:
        pytest.skip("cupy is imported already")
    with pytest.raises(InvalidArgumentError, match=r"got cupy\.ndarray"):
        F.deconvolution_2d(impostor, W)
    assert "cupy" not in sys.modules


def test_a_list_of_a_frameworks_arrays_is_refused(
    F: Connection, opened: list[FakeFramework]
) -> None:
    x: Any = [FakeTensor(X[0]), FakeTensor(X[1])]

    with pytest.raises(
        InvalidArgumentError,
        match=r"x must be one array, got a list with .*FakeTensor in it: stack",
    ):
        F.deconvolution_2d(x, W)


def parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return [*inspect.signature(function).parameters.values()]


class _Unhashable(type):
    """What a type is an instance of that no dictionary takes."""

    __hash__ = None  # type: ignore[assignment]  # as Python says it

    def __eq__(cls, other: object) -> bool:
        return cls is other


def test_a_type_without_a_hash_is_refused_as_any_other(F: Connection) -> None:
    x: Any = _Unhashable("Odd", (), {})()

    with pytest.raises(InvalidArgumentError, match=r"x must be an array of numpy, .* got .*Odd"):
        F.deconvolution_2d(x, W)


def test_all_functions_have_chainers_arguments(F: Connection) -> None:
    """They are written out five times, so that editors show them."""
    ours = parameters(F.deconvolution_2d)
    assert parameters(F.remote.deconvolution_2d) == ours
    assert parameters(F.vjp) == ours

    gradients = parameters(F.deconvolution_2d_grad)
    assert parameters(F.remote.deconvolution_2d_grad) == gradients
    assert [p.name for p in gradients if p.name not in ("gy", "wanted")] == [p.name for p in ours]
    for theirs in gradients:
        own = next((p for p in ours if p.name == theirs.name), None)
        if own is not None and own.name != "b":  # which must be given before gy
            assert theirs == own
