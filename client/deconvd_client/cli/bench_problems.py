"""The layers that `deconvd bench` calls, and calls that move the same bytes in one direction alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from deconvd.model.dtypes import Array, DType
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec

__all__ = [
    "LAYERS_BY_NAME",
    "BenchLayer",
    "BenchOperands",
    "downlink_problem",
    "smallest_problem",
    "uplink_problem",
]


@dataclass(frozen=True, slots=True)
class BenchLayer:
    """A deconvolution to measure.

    Attributes:
        name: As in tables.
        x, W: Shapes of the operands.
    """

    name: str
    x: tuple[int, ...]
    W: tuple[int, ...]
    geometry: Geometry

    def problem(self, dtype: DType) -> Problem:
        """Return it for an element type. Raises InvalidArgumentError if the shapes do not fit together."""
        return Problem(TensorSpec(self.x, dtype), TensorSpec(self.W, dtype), self.geometry)


def _doubling_layer(name: str, n: int, c: int, h: int, w: int) -> BenchLayer:
    """Return a layer that doubles images, and whose computing is small beside its bytes. y is twice as large as x."""
    return BenchLayer(name, (n, c, h, w), (c, c // 2, 4, 4), Geometry.from_arguments(2, 1))


LAYERS_BY_NAME: Final[Mapping[str, BenchLayer]] = {
    layer.name: layer
    for layer in (
        _doubling_layer("tiny", 1, 8, 8, 8),
        _doubling_layer("small", 8, 8, 32, 32),
        _doubling_layer("medium", 8, 8, 128, 128),
        _doubling_layer("large", 32, 8, 256, 256),
    )
}
"""In float32, x and y have 6 kB, 0.8 MB, 13 MB and 201 MB together."""


@dataclass(frozen=True, slots=True)
class BenchOperands:
    """The operands of a call. No element of y is zero, since zeros can travel packed."""

    x: Array
    W: Array
    b: Array
    geometry: Geometry

    @classmethod
    def of(cls, problem: Problem) -> BenchOperands:
        """Return random operands."""
        generator = np.random.default_rng(0)
        x, W, b = (
            generator.uniform(0.5, 1.5, shape).astype(problem.x.dtype)
            for shape in (problem.x.shape, problem.W.shape, (problem.c_O,))
        )
        return cls(x, W, b, problem.geometry)

    @property
    def nbytes(self) -> int:
        """Their size, in bytes."""
        return self.x.nbytes + self.W.nbytes + self.b.nbytes


def smallest_problem(dtype: DType) -> Problem:
    """Return the call whose operands and result have one element each."""
    one = TensorSpec((1, 1, 1, 1), dtype)
    return Problem(one, one, Geometry())


def uplink_problem(problem: Problem) -> Problem:
    """Return a call with the same x whose result has as few pixels as it can: what it takes is the way there."""
    h, w = problem.image
    pad = ((h - 1) // 2, (w - 1) // 2)
    W = TensorSpec((problem.c_I, 1, 1, 1), problem.x.dtype)
    return Problem(problem.x, W, Geometry(pad=pad))


def downlink_problem(problem: Problem) -> Problem:
    """Return a call with a y of the same shape whose x has as few pixels as it can: what it takes is the way back."""
    image = tuple(min(size, 2) for size in problem.output)
    stride = tuple(max(size - 1, 1) for size in problem.output)
    x = TensorSpec((problem.n, 1, image[0], image[1]), problem.x.dtype)
    W = TensorSpec((1, problem.c_O, 1, 1), problem.x.dtype)
    return Problem(x, W, Geometry(stride=(stride[0], stride[1])))
