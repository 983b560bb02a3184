"""Problems and operands for hypothesis: small, and in every corner of what is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec

__all__ = ["FLOAT64", "Operands", "operands", "problems"]

FLOAT64: tuple[DType, ...] = (np.dtype(np.float64),)

_SIZES = [1, 2, 3, 4, 5]
_COUNTS = [1, 2, 3]
_RARELY_EMPTY = 5
"""How many times as often as 0 the other sizes are drawn: most problems must have products to test."""


@dataclass(frozen=True)
class Operands:
    """A problem with arrays for it; b is None where the call has no bias."""

    problem: Problem
    x: Array
    W: Array
    b: Array | None
    gy: Array


@dataclass(frozen=True)
class _Axis:
    """One axis of a problem."""

    image: int
    kernel: int
    stride: int
    pad: int
    dilate: int
    outsize: int | None


@st.composite
def _axes(draw: st.DrawFn) -> _Axis:
    """Draw an axis; stride may exceed the kernel, pad may cut all that a tap adds."""
    image = draw(st.sampled_from(_SIZES * _RARELY_EMPTY + [0]))
    # without input pixels, only dilate (kernel - 1) of the taps' reach makes an output
    kernel = draw(st.integers(1 if image else 2, 4))
    stride = draw(st.integers(1, 4))
    dilate = draw(st.integers(1, 3))
    most = stride * image + dilate * (kernel - 1)  # with pad 0 and outsize as large as may be
    pad = draw(st.integers(0, min(4, (most - 1) // 2)))
    return _Axis(
        image, kernel, stride, pad, dilate, draw(_outsizes(most - 2 * pad, spare=stride - 1))
    )


def _outsizes(largest: int, *, spare: int) -> st.SearchStrategy[int | None]:
    natural = largest - spare
    given = st.integers(max(natural - spare, 1), largest)
    return st.none() | given if natural >= 1 else given


@st.composite
def problems(draw: st.DrawFn, element_types: tuple[DType, ...] = ELEMENT_TYPES) -> Problem:
    """Draw a problem whose operands have a few hundred elements at most."""
    h, w = draw(_axes()), draw(_axes())
    groups = draw(st.integers(1, 4))
    counts = st.sampled_from(_COUNTS * _RARELY_EMPTY + [0])
    n = draw(counts)
    ins = groups * draw(counts)
    outs_per_group = draw(counts)
    geometry = Geometry(
        stride=(h.stride, w.stride),
        pad=(h.pad, w.pad),
        outsize=(h.outsize, w.outsize),
        dilate=(h.dilate, w.dilate),
        groups=groups,
    )
    x = TensorSpec((n, ins, h.image, w.image), draw(st.sampled_from(element_types)))
    W = TensorSpec((ins, outs_per_group, h.kernel, w.kernel), draw(st.sampled_from(element_types)))
    return Problem(x, W, geometry)


@st.composite
def operands(
    draw: st.DrawFn, element_types: tuple[DType, ...] = ELEMENT_TYPES, *, integers: bool = False
) -> Operands:
    """Draw a problem and arrays for it.

    Args:
        integers: Elements from -3 to 3, whose sums of products float32 holds exactly; else normally distributed.
    """
    problem = draw(problems(element_types))
    random = np.random.default_rng(draw(st.integers(0, 2**16)))

    def array(spec: TensorSpec) -> Array:
        size = math.prod(spec.shape)
        values = random.integers(-3, 4, size) if integers else random.standard_normal(size)
        return values.reshape(spec.shape).astype(spec.dtype)

    b = array(problem.b) if draw(st.booleans()) else None
    return Operands(problem, array(problem.x), array(problem.W), b, array(problem.y))
