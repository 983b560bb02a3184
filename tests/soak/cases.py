"""Calls whose results are known: from the definition, from plain NumPy, and from Chainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deconvd.model.dtypes import ELEMENT_TYPES, Array
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from tests import definition
from tests.golden import Tolerance, golden_cases, tolerance

__all__ = ["Case", "chainers", "large", "small"]

_EXACT = Tolerance(0, 0)
_SMALL_COUNT = 24


@dataclass(frozen=True)
class Case:
    """A call of each function.

    Attributes:
        params: stride, pad, outsize, dilate and groups, where they are given.
        y: What `deconvolution_2d` must return.
        gradients: What `deconvolution_2d_grad` must return.
    """

    x: Array
    W: Array
    b: Array
    gy: Array
    y: Array
    gradients: tuple[Array, ...]
    params: Mapping[str, Any] = field(default_factory=dict)
    tolerances: tuple[Tolerance, Tolerance] = (_EXACT, _EXACT)

    def check_y(self, y: Array) -> None:
        """Raise AssertionError unless `y` is right."""
        _check(y, self.y, self.tolerances[0])

    def check_gradients(self, *results: Array | None) -> None:
        """Raise AssertionError unless the gradients are right."""
        for result, expected in zip(results, self.gradients, strict=True):
            assert result is not None
            _check(result, expected, self.tolerances[1])


def small(random: np.random.Generator) -> Iterator[Case]:
    """Yield small cases of all element types whose sums float32 holds exactly, so that results are rounded once."""
    for _ in range(_SMALL_COUNT):
        groups, n, ins, outs, h, w, k_h, k_w = random.integers(1, 4, 8).tolist()
        stride, dilate = (tuple(random.integers(1, 4, 2).tolist()) for _ in range(2))
        x_type, W_type = (ELEMENT_TYPES[i] for i in random.integers(0, len(ELEMENT_TYPES), 2))
        x = TensorSpec((n, ins * groups, h, w), x_type)
        W = TensorSpec((ins * groups, outs, k_h, k_w), W_type)
        problem = Problem(x, W, Geometry(stride=stride, dilate=dilate, groups=groups))
        x_, W_, b, gy = (_whole(random, spec) for spec in (x, W, problem.b, problem.y))
        gradients = zip(
            definition.gradients(problem, x_, W_, gy), (x_type, W_type, x_type), strict=True
        )
        yield Case(
            *(x_, W_, b, gy),
            y=definition.deconvolve(problem, x_, W_, b).astype(x_type),
            gradients=tuple(gradient.astype(dtype) for gradient, dtype in gradients),
            params={"stride": stride, "dilate": dilate, "groups": groups},
        )


def large(random: np.random.Generator, *shapes: tuple[int, int, int, int]) -> Iterator[Case]:
    """Yield a case for each shape of x, of a filter of one tap, for which NumPy is enough."""
    for shape in shapes:
        F32 = np.dtype(np.float32)
        x, gy = (_whole(random, TensorSpec(shape, F32)) for _ in range(2))
        W = _whole(random, TensorSpec((shape[1], shape[1], 1, 1), F32))
        b = _whole(random, TensorSpec((shape[1],), F32))
        y = np.einsum("nihw,io->nohw", x, W[:, :, 0, 0]) + b[:, None, None]
        gx = np.einsum("nohw,io->nihw", gy, W[:, :, 0, 0])
        # in float64, of which BLAS makes products: each sum has less than 2^24, and so is exact in float32
        wide_x, wide_gy = (np.moveaxis(a.astype("f8"), 1, 0).reshape(shape[1], -1) for a in (x, gy))
        gW = (wide_x @ wide_gy.T)[:, :, None, None].astype(F32)
        gradients = gx, gW, wide_gy.sum(axis=1).astype(F32)
        yield Case(x, W, b, gy, y.astype(F32), tuple(a.astype(F32) for a in gradients))


def chainers() -> Iterator[Case]:
    """Yield Chainer's own results."""
    for case in golden_cases():
        arrays = case.arrays
        if {"x", "W", "b", "gy", "y", "gx", "gW", "gb"} <= set(arrays):
            x, W, b, gy, y = (arrays[name] for name in ("x", "W", "b", "gy", "y"))
            yield Case(
                *(x, W, b, gy, y),
                gradients=tuple(arrays[name] for name in ("gx", "gW", "gb")),
                params=case.params,
                tolerances=(tolerance(case, 0), tolerance(case, 1)),
            )


def _whole(random: np.random.Generator, spec: TensorSpec) -> Array:
    return random.integers(-3, 4, spec.shape).astype(spec.dtype)


def _check(result: Array, expected: Array, by: Tolerance) -> None:
    assert result.dtype == expected.dtype
    np.testing.assert_allclose(
        result.astype(np.float64), expected.astype(np.float64), rtol=by.rtol, atol=by.atol
    )
