"""Random problems of one product each, over all that a server takes: to fit the choice of plans to, and to test it.

Images have 4 to 200 pixels on a side, there are 1 to 1024 channels, filters have 1 to 31 taps on a side, and strides
are 1 to 8. Extents are drawn by their logarithms. A problem is known by its number. Needs no card.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Final

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, DType
from deconvd.model.geometry import Geometry, Pair
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.plan import Product

__all__ = ["RandomProblem", "draw_problem"]

_MOST_BYTES: Final = 192 << 20
"""Bound on x, W and y together."""

_MOST_FLOPS: Final = 2e11
"""Bound on the operations of a problem: 4 ms of a large card in float32, and more with a bad plan."""

_TYPES: Final[dict[str, DType]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "tf32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


@dataclass(frozen=True, slots=True)
class RandomProblem:
    """A problem, its product, and how it is computed.

    Attributes:
        number: What it is drawn from.
        type_name: Its element type, or ``tf32``.
    """

    number: int
    product: Product
    problem: Problem
    type_name: str

    @property
    def options(self) -> Options:
        """The options of a request for it, untuned."""
        return Options(allow_tf32=self.type_name == "tf32")

    @property
    def flops(self) -> int:
        """Operations of the product, those that meet no output pixel included."""
        problem = self.problem
        pixels = problem.n * math.prod(problem.image)
        return 2 * pixels * problem.c_I * problem.W.shape[1] * math.prod(problem.kernel)

    @property
    def fields(self) -> dict[str, object]:
        """The problem as an object of JSON."""
        geometry = self.problem.geometry
        return {
            "number": self.number,
            "x": self.problem.x.shape,
            "W": self.problem.W.shape,
            "y": self.problem.y.shape,
            "stride": geometry.stride,
            "pad": geometry.pad,
            "dilate": geometry.dilate,
            "groups": geometry.groups,
        }


def draw_problem(number: int) -> RandomProblem:
    """Return the problem of a number: always the same."""
    rng = random.Random(number)
    product = rng.choice(list(Product))
    type_name = rng.choice([*_TYPES])
    while True:
        try:
            problem = _draw(rng, _TYPES[type_name])
        except InvalidArgumentError:
            continue
        drawn = RandomProblem(number, product, problem, type_name)
        size_bytes = sum(spec.nbytes for spec in (problem.x, problem.W, problem.y))
        if problem.has_products and size_bytes <= _MOST_BYTES and drawn.flops <= _MOST_FLOPS:
            return drawn


def _draw(rng: random.Random, dtype: DType) -> Problem:
    image, kernel, stride = _pair(rng, 4, 200), _pair(rng, 1, 31), _pair(rng, 1, 8)
    dilate = (1, 1) if rng.random() < 0.85 else (rng.randint(1, 3),) * 2
    # half of the pads are as in layers that enlarge an image by just the stride
    usual = rng.random() < 0.5
    pad = tuple(
        max(k - s, 0) // 2 if usual else rng.randint(0, max(k // 2, 0))
        for k, s in zip(kernel, stride, strict=True)
    )
    inputs, outputs = _extent(rng, 1, 1024), _extent(rng, 1, 1024)
    groups = _draw_groups(rng, inputs, outputs)
    n = rng.choice([1, 1, 2, 4, 8, 16, 32, 64])
    natural = Geometry(stride, (pad[0], pad[1]), (None, None), dilate, groups).natural_size(
        image, kernel
    )
    outsize: tuple[int | None, int | None] = (None, None)
    if rng.random() < 0.1:
        outsize = (
            natural[0] + rng.randint(1 - stride[0], stride[0] - 1),
            natural[1] + rng.randint(1 - stride[1], stride[1] - 1),
        )
    geometry = Geometry(stride, (pad[0], pad[1]), outsize, dilate, groups)
    x = TensorSpec((n, inputs, *image), dtype)
    W = TensorSpec((inputs, outputs // groups, *kernel), dtype)
    return Problem(x, W, geometry)


def _pair(rng: random.Random, least: int, most: int) -> Pair:
    """Return the extents of both axes: equal ones in three of four cases, as users have them."""
    first = _extent(rng, least, most)
    return first, first if rng.random() < 0.75 else _extent(rng, least, most)


def _extent(rng: random.Random, least: int, most: int) -> int:
    """Return a number, a power of two or a multiple of 8 in half of the cases, as users have them."""
    value = math.exp(rng.uniform(math.log(least), math.log(most + 1)))
    if rng.random() < 0.5:
        rounded = 1 << round(math.log2(value))
        return max(least, min(rounded, most))
    return max(least, min(int(value), most))


def _draw_groups(rng: random.Random, inputs: int, outputs: int) -> int:
    """Return how many groups there are: one in most cases, or some, or one for each channel."""
    common = [count for count in range(2, 65) if inputs % count == outputs % count == 0]
    if rng.random() < 0.75 or not common:
        return 1
    if inputs > 1 and outputs % inputs == 0 and rng.random() < 0.5:
        return inputs
    return rng.choice(common)


if __name__ == "__main__":
    for problem_number in range(20):
        print(draw_problem(problem_number))
