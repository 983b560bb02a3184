"""jax's arrays on a card: they stay there, and the results have the bits that numpy's have."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

# else jax takes three quarters of the card's memory for itself, and the server and other tests get the rest
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
jax: Any = pytest.importorskip("jax")
cupy: Any = pytest.importorskip("cupy")

GEOMETRY: dict[str, Any] = {"stride": 2, "pad": 1}


@pytest.fixture
def operands(request: pytest.FixtureRequest) -> list[Any]:
    """x, W and b on the host, in the element type of the test."""
    random = np.random.default_rng(0)
    dtype = jax.numpy.dtype(getattr(request, "param", "float32"))
    return [
        random.standard_normal(shape).astype(dtype)
        for shape in ((3, 16, 24, 24), (16, 8, 4, 4), (8,))
    ]


def on_card(arrays: list[Any]) -> list[Any]:
    return [jax.device_put(array, jax.devices("gpu")[0]) for array in arrays]


@pytest.mark.parametrize("operands", ["float16", "bfloat16", "float32"], indirect=True)
def test_arrays_on_a_card_stay_there_and_have_the_same_bits(
    card_F: Any, operands: list[Any]
) -> None:
    from deconvd_client.frameworks.jax_arrays import raw_array

    card = on_card(operands)
    for array in card:
        shared = raw_array(array)
        assert isinstance(shared, cupy.ndarray)
        assert shared.data.ptr == array.unsafe_buffer_pointer()
    y = card_F.deconvolution_2d(*card, **GEOMETRY)
    assert isinstance(y, jax.Array)
    assert y.device == card[0].device
    expected = card_F.deconvolution_2d(*operands, **GEOMETRY)
    np.testing.assert_array_equal(np.asarray(y), expected)

    found = card_F.deconvolution_2d_grad(*card, y, **GEOMETRY)
    gradients = card_F.deconvolution_2d_grad(*operands, expected, **GEOMETRY)
    for ours, theirs in zip(found, gradients, strict=True):
        assert ours.device == card[0].device
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def test_a_call_waits_for_what_jax_still_computes(card_F: Any, operands: list[Any]) -> None:
    x, W, _ = on_card(operands)
    expected = card_F.deconvolution_2d(np.asarray(x) * 2, np.asarray(W), **GEOMETRY)
    identity = jax.device_put(np.eye(24, dtype=np.float32), x.device)

    def delay(array: Any) -> Any:
        return jax.lax.fori_loop(0, 2000, lambda _, late: late @ identity, array) * 2

    with jax.default_matmul_precision("highest"):
        late = jax.jit(delay)(x)
    np.testing.assert_array_equal(
        np.asarray(card_F.deconvolution_2d(late, W, **GEOMETRY)), expected
    )


def test_compiled_functions_and_their_gradients_compute_on_the_card(
    card_F: Any, operands: list[Any]
) -> None:
    x, W, b = on_card(operands)

    def loss(x: Any, W: Any, b: Any) -> Any:
        return (card_F.deconvolution_2d(x, W, b, **GEOMETRY) ** 2).sum() / 2

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, W, b)

    y = card_F.deconvolution_2d(*operands, **GEOMETRY)
    expected = card_F.deconvolution_2d_grad(*operands, y, **GEOMETRY)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.device == x.device
        scale = float(np.abs(theirs).max())
        np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, rtol=0, atol=1e-5)
