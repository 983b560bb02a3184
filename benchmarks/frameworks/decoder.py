"""The decoder of `examples.train_decoder` as a workload: two layers, 16 codes a step, by each way to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from deconvd.model.dtypes import Array
from deconvd_client import Connection

__all__ = ["LEARNING_RATE", "STRIDE_PAD", "FrameworkCalls", "Parameters", "Workload", "plain_calls"]

LEARNING_RATE: Final = 0.01
STRIDE_PAD: Final = ((1, 0), (2, 1))
"""The stride and the pad of each layer."""

Parameters = tuple[Array, Array, Array, Array]
"""W and b of the first layer, then of the second."""


@dataclass(frozen=True)
class Workload:
    """Codes, the images that they stand for, and the first parameters."""

    codes: Array
    images: Array
    parameters: Parameters

    @classmethod
    def make(cls) -> Workload:
        """Return one of random numbers."""
        random = np.random.default_rng(0)

        def normal(*shape: int) -> Array:
            return random.standard_normal(shape, np.float32)

        W_first, W_second = normal(16, 32, 4, 4) / 16, normal(32, 1, 4, 4) / 11
        parameters = W_first, np.zeros(32, np.float32), W_second, np.zeros(1, np.float32)
        return cls(normal(16, 16, 1, 1), np.abs(normal(16, 1, 8, 8)), parameters)


@dataclass(frozen=True)
class FrameworkCalls:
    """The same work as functions without arguments, each of which returns when its results are there.

    Attributes:
        step: A training step: the loss, its gradients, and a change of the parameters. It returns the loss.
        infer: The decoder's images.
    """

    step: Callable[[], float]
    infer: Callable[[], Any]


def plain_calls(F: Connection, workload: Workload) -> FrameworkCalls:
    """Return the work by NumPy and plain calls of ours."""
    W_first, b_first, W_second, b_second = parameters = [p.copy() for p in workload.parameters]
    first, second = STRIDE_PAD

    def forward() -> tuple[Array, Array]:
        hidden = np.maximum(F.deconvolution_2d(workload.codes, W_first, b_first, *first), 0)
        y = F.deconvolution_2d(hidden, W_second, b_second, *second)
        return hidden, 1 / (1 + np.exp(-y))

    def step() -> float:
        hidden, y = forward()
        error = y - workload.images
        gy = 2 / error.size * error * y * (1 - y)
        g_hidden, *of_second = F.deconvolution_2d_grad(hidden, W_second, b_second, gy, *second)
        assert g_hidden is not None
        g_first = g_hidden * (hidden > 0)
        operands = workload.codes, W_first, b_first, g_first
        _, *of_first = F.deconvolution_2d_grad(*operands, *first, wanted=["gW", "gb"])
        for parameter, gradient in zip(parameters, [*of_first, *of_second], strict=True):
            assert gradient is not None
            parameter -= LEARNING_RATE * gradient
        return float(np.mean(error**2))

    return FrameworkCalls(step, lambda: forward()[1])
