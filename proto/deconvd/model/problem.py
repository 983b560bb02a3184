"""One deconvolution as a problem: the shapes of its operands and its geometry, checked against each other. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array, DType, compute_type, element_type, native_type
from deconvd.model.geometry import MAX_EXTENT, Geometry, Pair

__all__ = ["MAX_DIMENSIONS", "Problem", "TensorSpec", "check_extents", "problem_of", "spec_of"]

MAX_DIMENSIONS = 8
"""More dimensions than any operand has. Errors show no more of a shape either."""

_MAX_NBYTES = 2**62
"""Larger sizes overflow numpy's index arithmetic, even if another extent is zero and the array is empty."""


@dataclass(frozen=True)
class TensorSpec:
    """The shape and the element type of a tensor."""

    shape: tuple[int, ...]
    dtype: DType

    @cached_property
    def nbytes(self) -> int:
        """Size of its elements, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def raw(self) -> TensorSpec:
        """The same spec in the byte order of `Tensor.raw`, which is little-endian."""
        return TensorSpec(self.shape, self.dtype.newbyteorder("<"))

    def __str__(self) -> str:
        shown = ", ".join(str(extent) for extent in self.shape[:MAX_DIMENSIONS])
        more = ", ..." if len(self.shape) > MAX_DIMENSIONS else ""
        return f"{self.dtype} of shape ({shown}{more})"


def spec_of(array: Array) -> TensorSpec:
    """Return the shape and, in native byte order, the element type of an array."""
    dtype = array.dtype
    # small calls notice each function: an attribute costs less
    return TensorSpec(array.shape, dtype if dtype.isnative else native_type(dtype))


@dataclass(frozen=True)
class Problem:
    """A deconvolution of `x` by `W`. Hashable, and checked when it is created.

    All derived values are cached, because most calls are repeated and use the same object (see `problem_of`).

    Attributes:
        x: Shape ``(n, c_I, h_I, w_I)``.
        W: Shape ``(c_I, c_O / groups, h_K, w_K)``; its element type may differ from x's.
        geometry: How the filter moves.
        output: Size ``(h_O, w_O)`` of the output image, in pixels.
        y: The result: shape ``(n, c_O, h_O, w_O)``, element type of x. gy has the same.

    Raises:
        InvalidArgumentError: An operand has the wrong shape or type, or the operands do not fit together.
    """

    x: TensorSpec
    W: TensorSpec
    geometry: Geometry
    output: Pair = field(init=False, compare=False)
    y: TensorSpec = field(init=False, compare=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_tensor("x", self.x, dimensions=4)
        _check_tensor("W", self.W, dimensions=4)
        self._check_channels()
        output = self.geometry.output_size(self.image, self.kernel)
        y = TensorSpec((self.n, self.c_O, *output), self.x.dtype)
        check_extents("y", y)
        object.__setattr__(self, "output", output)
        object.__setattr__(self, "y", y)
        object.__setattr__(self, "_hash", hash((self.x, self.W, self.geometry)))

    def __hash__(self) -> int:
        # computed once: several caches on a call's way have problems as keys
        return self._hash

    def __reduce__(self) -> tuple[object, ...]:
        return Problem, (
            self.x,
            self.W,
            self.geometry,
        )  # a stored hash would be wrong: hashes differ between processes

    def _check_channels(self) -> None:
        if self.c_I != self.W.shape[0]:
            raise InvalidArgumentError(
                f"W must have as many input channels, W.shape[0], as x has, x.shape[1]: "
                f"got W.shape {self.W.shape} for x.shape {self.x.shape}",
                argument="W",
            )
        if self.c_I % self.groups:
            raise InvalidArgumentError(
                f"groups must divide the number of input channels, {self.c_I}, got {self.groups}",
                argument="groups",
            )

    @cached_property
    def n(self) -> int:
        """Batch size."""
        return self.x.shape[0]

    @cached_property
    def c_I(self) -> int:
        """Number of input channels."""
        return self.x.shape[1]

    @cached_property
    def c_O(self) -> int:
        """Number of output channels."""
        return self.W.shape[1] * self.groups

    @cached_property
    def groups(self) -> int:
        """Number of groups."""
        return self.geometry.groups

    @cached_property
    def image(self) -> Pair:
        """Size ``(h_I, w_I)`` of the input image, in pixels."""
        return self.x.shape[2], self.x.shape[3]

    @cached_property
    def kernel(self) -> Pair:
        """Size ``(h_K, w_K)`` of the filter, in taps."""
        return self.W.shape[2], self.W.shape[3]

    @cached_property
    def has_products(self) -> bool:
        """Whether y contains any product of x and W, that is, neither of them is empty."""
        return self.x.nbytes > 0 and self.W.nbytes > 0

    @cached_property
    def b(self) -> TensorSpec:
        """The bias: shape ``(c_O,)``, element type of x. gb has the same."""
        return TensorSpec((self.c_O,), self.x.dtype)

    @cached_property
    def compute_type(self) -> DType:
        """The type in which products are computed and summed."""
        return compute_type(self.x.dtype, self.W.dtype)

    def check_b(self, b: TensorSpec) -> None:
        """Raise InvalidArgumentError unless `b` is a bias for this problem."""
        _check_tensor("b", b, dimensions=1)
        _check_same("b", b, self.b, "c_O elements of x's element type")

    def check_gy(self, gy: TensorSpec) -> None:
        """Raise InvalidArgumentError unless `gy` can be a gradient with respect to this problem's result."""
        _check_tensor("gy", gy, dimensions=4)
        _check_same("gy", gy, self.y, "the shape and element type of the output")


@lru_cache(maxsize=1024)
def problem_of(x: TensorSpec, W: TensorSpec, geometry: Geometry) -> Problem:
    """Return the problem with these operands. It is cached, because most calls are repeated.

    Raises:
        InvalidArgumentError: See `Problem`.
    """
    return Problem(x, W, geometry)


def _check_tensor(name: str, spec: TensorSpec, *, dimensions: int) -> None:
    element_type(name, spec.dtype)
    if len(spec.shape) != dimensions:
        raise InvalidArgumentError(
            f"{name} must have {dimensions} dimension{'s'[: dimensions - 1]}, "
            f"got {len(spec.shape)}: {spec}",
            argument=name,
        )
    check_extents(name, spec)


def check_extents(name: str, spec: TensorSpec) -> None:
    """Raise InvalidArgumentError if no tensor can have this shape: numpy has no such array, even an empty one."""
    if len(spec.shape) > MAX_DIMENSIONS:
        raise InvalidArgumentError(
            f"{name} must have at most {MAX_DIMENSIONS} dimensions, got {len(spec.shape)}",
            argument=name,
        )
    nominal = math.prod(max(extent, 1) for extent in spec.shape) * spec.dtype.itemsize
    if nominal > _MAX_NBYTES or not all(0 <= extent <= MAX_EXTENT for extent in spec.shape):
        raise InvalidArgumentError(
            f"{name}: each dimension must be from 0 to {MAX_EXTENT}, and the size at most {_MAX_NBYTES} bytes "
            f"(a dimension of 0 counts as 1), got {spec}",
            argument=name,
        )


def _check_same(name: str, given: TensorSpec, wanted: TensorSpec, what: str) -> None:
    if given != wanted:
        raise InvalidArgumentError(f"{name} must have {what}: {wanted}, got {given}", argument=name)
