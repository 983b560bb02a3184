"""The decoder in JAX, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.frameworks.decoder import LEARNING_RATE, STRIDE_PAD, FrameworkCalls, Workload
from deconvd_client import Connection

__all__ = ["local_calls", "remote_calls"]


def remote_calls(F: Connection, workload: Workload) -> FrameworkCalls:
    """Return the work by calls of ours."""
    return _calls(F.deconvolution_2d, workload)


def local_calls(workload: Workload) -> FrameworkCalls:
    """Return the work by JAX's own operators."""
    return _calls(_deconvolution_2d, workload)


def _deconvolution_2d(x: Any, W: Any, b: Any, stride: int, pad: int) -> Any:
    edge = W.shape[2] - 1 - pad
    y = jax.lax.conv_general_dilated(
        x,
        jnp.flip(W, (2, 3)).swapaxes(0, 1),
        window_strides=(1, 1),
        padding=[(edge, edge)] * 2,
        lhs_dilation=(stride, stride),
    )
    return y + b[:, None, None]


def _calls(deconvolution_2d: Callable[..., Any], workload: Workload) -> FrameworkCalls:
    parameters = [jnp.asarray(parameter) for parameter in workload.parameters]
    codes, images = jnp.asarray(workload.codes), jnp.asarray(workload.images)

    def decode(parameters: Any, codes: Any) -> Any:
        W_first, b_first, W_second, b_second = parameters
        hidden = jax.nn.relu(deconvolution_2d(codes, W_first, b_first, *STRIDE_PAD[0]))
        return jax.nn.sigmoid(deconvolution_2d(hidden, W_second, b_second, *STRIDE_PAD[1]))

    def loss(parameters: Any) -> Any:
        return jnp.mean((decode(parameters, codes) - images) ** 2)

    @jax.jit  # type: ignore[untyped-decorator]  # jax is not there for type checkers
    def update(parameters: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters)
        changed = [p - LEARNING_RATE * g for p, g in zip(parameters, gradients, strict=True)]
        return value, changed

    compiled = jax.jit(decode)

    def step() -> float:
        value, parameters[:] = update(parameters)
        return float(value)

    return FrameworkCalls(step, lambda: np.asarray(compiled(parameters, codes)))
