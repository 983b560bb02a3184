"""The gradients of gradients: compared with differences of losses, and with what is left out if it is zero."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deconvd_client import Connection, InvalidArgumentError
from tests.fake_framework import FakeTracer, FakeTracingFramework
from tests.test_frameworks import tracing

__all__ = ["tracing"]

random = np.random.default_rng(0)

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": (2, 1), "pad": 1, "outsize": (10, None)},
    {"dilate": (1, 2), "groups": 2},
]


def operands(F: Connection, arguments: dict[str, Any]) -> dict[str, Any]:
    """x, W and gy, and gradients of a loss with respect to gx, gW and gb."""
    x = random.standard_normal((2, 4, 5, 6))
    W = random.standard_normal((4, 3, 3, 2))
    gy = random.standard_normal(F.deconvolution_2d(x, W, **arguments).shape)
    ggb = random.standard_normal(gy.shape[1])
    ggx, ggW = random.standard_normal(x.shape), random.standard_normal(W.shape)
    return {"x": x, "W": W, "gy": gy, "ggx": ggx, "ggW": ggW, "ggb": ggb}


def loss(F: Connection, a: dict[str, Any], arguments: dict[str, Any]) -> float:
    """A loss whose gradients with respect to gx, gW and gb are ggx, ggW and ggb."""
    gradients = F.deconvolution_2d_grad(
        a["x"], a["W"], np.empty_like(a["ggb"]), a["gy"], **arguments
    )
    terms = zip(gradients, (a["ggx"], a["ggW"], a["ggb"]), strict=True)
    return sum(float(np.vdot(g, gg)) for g, gg in terms if g is not None)


@pytest.mark.parametrize("arguments", GEOMETRIES, ids=str)
def test_they_agree_with_differences_of_the_loss(F: Connection, arguments: dict[str, Any]) -> None:
    a = operands(F, arguments)
    found = F.deconvolution_2d_double_grad(**a, **arguments)

    for name, gradient in zip(("x", "W", "gy"), found, strict=True):
        assert gradient is not None
        for _ in range(3):
            step = random.standard_normal(a[name].shape)
            high, low = a | {name: a[name] + step}, a | {name: a[name] - step}
            difference = (loss(F, high, arguments) - loss(F, low, arguments)) / 2
            # the loss is linear in each operand, so differences have no error but rounding
            np.testing.assert_allclose(np.vdot(gradient, step), difference, rtol=1e-10)


@pytest.mark.parametrize("kept", ["ggx", "ggW", "ggb"])
@pytest.mark.parametrize("as_remote", [False, True])
def test_what_is_left_out_counts_as_zero(F: Connection, kept: str, as_remote: bool) -> None:
    a = operands(F, {})
    zeros = {name: np.zeros_like(a[name]) for name in ("ggx", "ggW", "ggb") if name != kept}
    expected = F.deconvolution_2d_double_grad(**(a | zeros))
    if as_remote:
        a |= {name: F.put(a[name]) for name in ("x", "W", "gy", kept)}

    found = F.deconvolution_2d_double_grad(**(a | dict.fromkeys(zeros)))

    for name, ours, theirs in zip(found._fields, found, expected, strict=True):
        assert theirs is not None
        if ours is None:
            assert {"gx": "ggW", "gW": "ggx", "ggy": kept}[name] in zeros
            assert not theirs.any()
        else:
            np.testing.assert_array_equal(ours, theirs)


def test_without_any_gradient_all_are_zero(F: Connection) -> None:
    a = operands(F, {})

    assert F.deconvolution_2d_double_grad(a["x"], a["W"], a["gy"], None, None) == (None, None, None)


def test_only_what_is_wanted_is_computed(F: Connection) -> None:
    a = operands(F, {})

    found = F.deconvolution_2d_double_grad(**a, wanted={"gW"})

    assert (found.gx, found.ggy) == (None, None)
    assert found.gW is not None
    assert found.gW.shape == a["W"].shape


@pytest.mark.parametrize("name", ["gy", "ggx", "ggW", "ggb"])
def test_a_wrong_gradient_is_named(F: Connection, name: str) -> None:
    a = operands(F, {})
    a[name] = a[name][:1]

    with pytest.raises(
        InvalidArgumentError,
        match=rf"^{name} must have the shape and element type of {name[1:]}: float64 of",
    ) as raised:
        F.deconvolution_2d_double_grad(**a)

    assert raised.value.argument == name


def test_another_name_is_not_wanted(F: Connection) -> None:
    a = operands(F, {})

    with pytest.raises(InvalidArgumentError, match=r"wanted must be .* names from gx, gW, ggy"):
        F.deconvolution_2d_double_grad(**a, wanted=["gb"])


def test_calls_with_a_traced_operand_are_recorded(
    F: Connection, tracing: FakeTracingFramework
) -> None:
    a = operands(F, {})
    expected = F.deconvolution_2d_double_grad(**a, wanted=["gx"])

    found: Any = F.deconvolution_2d_double_grad(**(a | {"x": FakeTracer(a["x"])}), wanted=["gx"])

    assert [record[0] for record in tracing.records] == ["deconvolution_2d_grad"]
    np.testing.assert_array_equal(found.gx.array, expected.gx)
