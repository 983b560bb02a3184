"""Calls of a layer, by a connection to a server, and their operands."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from benchmarks.layers import LAYERS, Layer
from deconvd.model.dtypes import Array, DType
from deconvd_client import Connection

__all__ = ["SERVICE_LAYERS", "call_layer", "make_operands", "operands_of"]

_SERVICE_NAMES = (
    "generator 128-64 32",
    "generator 64-3 64",
    "unet 128-64 256 k2 s2",
    "tiny 8-4 8 k4 s2",
)

SERVICE_LAYERS = tuple(layer for layer in LAYERS if layer.name in _SERVICE_NAMES)
"""The layers whose calls are timed: three of 40 to 805 MB, and a tiny one."""


def make_operands(
    layer: Layer, dtype: DType, *, is_of_gradients: bool = False
) -> tuple[Array, ...]:
    """Return x and W, and gy for gradients."""
    generator = np.random.default_rng(0)
    problem = layer.problem(dtype)
    specs = (problem.x, problem.W, *([problem.y] if is_of_gradients else []))
    return tuple(generator.standard_normal(s.shape, np.float32).astype(dtype) for s in specs)


@lru_cache(maxsize=1)
def operands_of(layer: Layer, dtype: DType) -> tuple[Array, ...]:
    """Return x and W, which a process makes once for all rows of a layer: that takes longer than many calls."""
    return make_operands(layer, dtype)


def call_layer(F: Connection, layer: Layer, operands: Sequence[Array]) -> None:
    """Make a call with tuned plans: for gradients, if gy is among its operands."""
    x, W = operands[:2]
    with F.using_config("autotune", True):
        if len(operands) == 2:
            F.deconvolution_2d(
                x, W, None, layer.stride, layer.pad, dilate=layer.dilate, groups=layer.groups
            )
            return
        gy = operands[2]
        F.deconvolution_2d_grad(
            x, W, None, gy, layer.stride, layer.pad, dilate=layer.dilate, groups=layer.groups
        )
