"""Predicts how long plans take, from the problem alone, and so which ones are worth a try. Pure.

A plan's time is a product of powers of the problem's features: its logarithm is linear in theirs. The coefficients are
fitted to measured plans by `benchmarks.fit_cost_model`, and are in cost_model.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from functools import cache
from importlib.resources import files
from operator import mul
from typing import Final

from deconvd.model.options import Options, UseCudnnTensorCore
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.plan import Product

__all__ = [
    "MEASURED_CAPABILITY",
    "CostModel",
    "Family",
    "arithmetic_of",
    "cost_model",
    "features_of",
    "is_measured",
    "order_families",
    "worth_trying",
]

MEASURED_CAPABILITY: Final = 90
"""The kind of card whose plans were measured. What takes longer than what is another matter on another kind."""

_FLOPS_PER_MS: Final = {"half": 500e9, "float32": 45e9, "tf32": 250e9, "float64": 55e9}
_BYTES_PER_MS: Final = 3.5e9
"""What such a card does at best, about. The coefficients have been fitted with these figures."""

_LEAST_MS: Final = 0.002
"""Added to times before their logarithms are taken: of less work than that, no more is known than that it is little."""

_TILE: Final = 7
"""Logarithm of the extent of the matrix products' tiles."""

_SHORT_MS: Final = 0.1
_SHORT_RATIO, _LONG_RATIO = 2.0, 8.0
"""A family is worth a try if it is predicted to take at most that many times as long as the best one. For short plans,
a try costs more than the better plan saves in hundreds of calls."""

_DEPTHWISE_RATIO: Final = 0.8
"""Depthwise kernels are taken to need that much of the others' best time: too few of them have been measured."""

_CUDNN_RATIO: Final = 1.15
"""Where nothing is timed, cuDNN must be better by that much: it is predicted the least exactly."""


class Family(StrEnum):
    """A family of plans: cuDNN's, our own kernels by their names, or the fallback."""

    CUDNN = "cudnn"
    TENSOR_CORES = "tensor cores"
    DEPTHWISE = "depthwise"
    FALLBACK = "gemm columns"


class CostModel:
    """Predicts the times of families of plans.

    Args:
        coefficients: By family, product and arithmetic, one for each of `features_of`.
    """

    def __init__(
        self, coefficients: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
    ) -> None:
        self._coefficients = coefficients

    def predict_ms(
        self, product: Product, problem: Problem, options: Options, families: Collection[Family]
    ) -> dict[Family, float]:
        """Return how long the plan of each family takes that it would try first, in milliseconds.

        Args:
            problem: x and W have one element type.
            families: Those that have a plan. The fallback is one of them.
        """
        arithmetic = arithmetic_of(problem, options)
        features = features_of(product, problem, arithmetic)
        predicted: dict[Family, float] = {
            family: 2 ** sum(map(mul, self._coefficients[family][product][arithmetic], features))
            for family in families
            if family is not Family.DEPTHWISE
        }
        if Family.DEPTHWISE in families:
            predicted[Family.DEPTHWISE] = _DEPTHWISE_RATIO * min(predicted.values())
        return predicted


@cache
def cost_model() -> CostModel:
    """Return the model of the coefficients that travel with this package."""
    text = files("deconvd_server.device.cuda.plans").joinpath("cost_model.json").read_text()
    return CostModel(json.loads(text)["coefficients"])


def worth_trying(predicted_ms: Mapping[Family, float]) -> list[Family]:
    """Return the families that are worth a try where a few may be timed, the most promising first."""
    best_ms = min(predicted_ms.values(), default=0.0)
    most_ms = best_ms * (_SHORT_RATIO if best_ms < _SHORT_MS else _LONG_RATIO)
    ordered = sorted(predicted_ms, key=predicted_ms.__getitem__)
    return [family for family in ordered if predicted_ms[family] <= most_ms]


def order_families(predicted_ms: Mapping[Family, float]) -> list[Family]:
    """Return all families, in the order in which they are tried where nothing is timed."""

    def cost_ms(family: Family) -> float:
        return predicted_ms[family] * (_CUDNN_RATIO if family is Family.CUDNN else 1.0)

    return sorted(predicted_ms, key=cost_ms)


def arithmetic_of(problem: Problem, options: Options) -> str:
    """Return how a problem of one element type is computed: what decides how fast the card is."""
    if problem.x.dtype.itemsize == 2:
        return "half"
    if problem.x.dtype.itemsize == 8:
        return "float64"
    return "tf32" if options.allow_tf32 else "float32"


def is_measured(options: Options) -> bool:
    """Return whether plans with such options were measured. Those without tensor cores were not."""
    return options.use_cudnn_tensor_core is not UseCudnnTensorCore.NEVER


def features_of(product: Product, problem: Problem, arithmetic: str) -> list[float]:
    """Return what a plan's time depends on: mostly logarithms to base 2. `arithmetic` is of `arithmetic_of`."""
    geometry = problem.geometry
    itemsize = problem.x.dtype.itemsize
    groups = geometry.groups
    inputs, outputs = problem.c_I // groups, problem.W.shape[1]
    taps, stride = math.prod(problem.kernel), math.prod(geometry.stride)
    pixels, out_pixels = problem.n * math.prod(problem.image), problem.n * math.prod(problem.output)
    packed_taps = math.prod(
        -(-kernel // step) for kernel, step in zip(problem.kernel, geometry.stride, strict=True)
    )
    product_extents = {
        Product.Y: (pixels, outputs * taps, inputs),
        Product.GX: (pixels, inputs, outputs * taps),
        Product.GW: (outputs * taps, inputs, pixels),
    }
    rows, columns, depth = product_extents[product]
    tiles = -(-rows // (1 << _TILE)) * -(-columns // (1 << _TILE)) * groups
    flops_ms = 2.0 * pixels * problem.c_I * outputs * taps / _FLOPS_PER_MS[arithmetic]
    tensors_bytes = problem.x.nbytes + problem.W.nbytes + problem.y.nbytes
    column_bytes = max(itemsize, 4) if product is Product.Y else itemsize
    tensors_ms = tensors_bytes / _BYTES_PER_MS
    columns_ms = float(pixels) * problem.c_O * taps * column_bytes / _BYTES_PER_MS
    log_inputs, log_outputs, log_taps = math.log2(inputs), math.log2(outputs), math.log2(taps)
    return [
        1.0,
        math.log2(flops_ms + _LEAST_MS),
        math.log2(tensors_ms + _LEAST_MS),
        math.log2(columns_ms + _LEAST_MS),
        math.log2(flops_ms + tensors_ms + columns_ms + 2 * _LEAST_MS),
        log_inputs,
        log_outputs,
        math.log2(groups),
        log_taps,
        math.log2(stride),
        math.log2(pixels),
        math.log2(out_pixels),
        math.log2(problem.n),
        min(log_inputs, 4.0),
        min(log_outputs, 4.0),
        max(0.0, _TILE - math.log2(rows)),
        max(0.0, _TILE - math.log2(columns)),
        max(0.0, 8.0 - math.log2(tiles)),  # the fewer tiles, the emptier the card
        math.log2(depth),
        math.log2(packed_taps * stride / taps),
        float(inputs % 8 == 0),
        float(groups > 1),
        float(groups == problem.c_I),
        geometry.dilate[0] - 1.0,
        max(0.0, log_taps - 6.0),
    ]
