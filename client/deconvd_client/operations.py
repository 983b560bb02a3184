"""What callers give, checked and made into calls."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, cast

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.geometry import Geometry
from deconvd.gradients import Wanted
from deconvd.operation import DECONVOLVE, DECONVOLVE_GRAD
from deconvd.problem import Problem, TensorSpec, problem_of
from deconvd.tensor import Array, spec_of
from deconvd_client.asked import request_of
from deconvd_client.config import Config
from deconvd_client.kinds import is_from_cupy
from deconvd_client.residents import Call, Kept, RemoteTensor, Residents, Source

__all__ = ["GRADIENTS", "Operand", "Operations", "checked_array"]

GRADIENTS: Final = ("gx", "gW", "gb")

Operand = Array | Kept

_MaskedArray: Final = np.ma.MaskedArray


class Operations:
    """Makes calls of a connection's arguments; every method raises InvalidArgumentError.

    Args:
        residents: Whose RemoteTensors are taken.
        config: Says how to compute.
        takes_cupy: Whether cupy arrays are taken as they are: whoever makes the calls knows them.
    """

    def __init__(self, residents: Residents, config: Config, *, takes_cupy: bool = False) -> None:
        self._residents = residents
        self._config = config
        self._takes_cupy = takes_cupy

    def operand(self, name: str, value: object) -> Operand:
        """Return an argument as what calls take: the array, or what the server keeps."""
        if isinstance(value, np.ndarray) and not isinstance(value, _MaskedArray):
            return value
        if isinstance(value, RemoteTensor):
            return value.kept_for(self._residents, name)
        if isinstance(value, Kept):  # of a pullback to be
            return value
        if self._takes_cupy and is_from_cupy(value):
            return cast("Array", value)
        return checked_array(name, value)

    def lasting(self, name: str, value: object) -> Kept:
        """Return an argument as what the server is to keep beyond a call."""
        operand = self.operand(name, value)
        if isinstance(operand, Kept):
            return operand.shared()
        return Kept(spec_of(operand), source=Source(operand))

    def deconvolution(
        self, x: object, W: object, b: object, geometry: Geometry, *, stay: bool = False
    ) -> Call:
        """Return the call that computes y."""
        images, filters = self.operand("x", x), self.operand("W", W)
        problem = problem_of(spec_of_operand(images), spec_of_operand(filters), geometry)
        operands = {"w": filters}
        if b is not None:
            operands["b"] = self.operand("b", b)
            problem.check_b(spec_of_operand(operands["b"]))
        operands["x"] = images
        optional = () if b is None else ("b",)
        request = request_of(DECONVOLVE, problem, self._config.options, ("y",), optional)
        return Call(DECONVOLVE, request, problem, operands, {"y": problem.y}, stay)

    def differentiation(
        self,
        x: object,
        W: object,
        b: object,
        gy: object,
        geometry: Geometry,
        wanted: Collection[str],
        *,
        stay: bool = False,
    ) -> Call:
        """Return the call that computes gradients; of b only the shape and the type count."""
        images, filters = self.operand("x", x), self.operand("W", W)
        problem = problem_of(spec_of_operand(images), spec_of_operand(filters), geometry)
        if b is not None:
            problem.check_b(spec_of_operand(self.operand("b", b)))
        return self.way_back(problem, images, filters, gy, wanted, has_b=b is not None, stay=stay)

    def way_back(
        self,
        problem: Problem,
        x: Operand,
        W: Operand,
        gy: object,
        wanted: Collection[str],
        *,
        has_b: bool,
        stay: bool = False,
    ) -> Call:
        """Return the call that computes gradients of a problem whose operands are known to fit."""
        gradient = self.operand("gy", gy)
        problem.check_gy(spec_of_operand(gradient))
        mask = _wanted(wanted, has_b=has_b)
        operands: dict[str, Operand] = {}
        results: dict[str, TensorSpec] = {}
        if mask.gx:
            operands["w"], results["gx"] = W, problem.x
        if mask.gW:
            operands["x"], results["gw"] = x, problem.W
        if mask.gb:
            results["gb"] = problem.b
        operands["gy"] = gradient
        request = request_of(DECONVOLVE_GRAD, problem, self._config.options, tuple(results))
        return Call(DECONVOLVE_GRAD, request, problem, operands, results, stay)


def checked_array(name: str, value: object) -> Array:
    """Return an argument that is an array. Raises InvalidArgumentError if it is none, or masked."""
    if isinstance(value, _MaskedArray):
        raise InvalidArgumentError(
            f"{name} must not be a masked array, as its mask would be lost: give {name}.filled(value), "
            f"or {name}.data for what is below the mask",
            argument=name,
        )
    if not isinstance(value, np.ndarray):
        raise InvalidArgumentError(
            f"{name} must be a numpy.ndarray or a RemoteTensor, got {_kind_of(value)}"
            f"{_remedy(name, value)}",
            argument=name,
        )
    return value


def _kind_of(value: object) -> str:
    kind = type(value)
    if kind.__module__.startswith("PIL."):
        return f"a PIL image ({kind.__qualname__})"
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def _remedy(name: str, value: object) -> str:
    """Return how to make an array of what is none; empty if that cannot be told."""
    if is_from_cupy(value):
        return f": convert it with cupy.asnumpy({name})"
    if type(value).__module__.startswith("PIL."):
        return (
            f": convert it with numpy.asarray({name}, numpy.float32), which has the axes (h, w) or "
            "(h, w, c), and move them to (n, c, h, w)"
        )
    if type(value).__module__.startswith("chainer."):  # a Variable, or a Parameter
        return f": give {name}.array"
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        return f": convert it with numpy.asarray({name})"
    return ""


def spec_of_operand(operand: Operand) -> TensorSpec:
    """Return the shape and element type of an operand."""
    return operand.spec if isinstance(operand, Kept) else spec_of(operand)


def _wanted(names: Collection[str], *, has_b: bool) -> Wanted:
    try:
        chosen = None if isinstance(names, str) else set(names)
    except TypeError:
        chosen = None
    if chosen is None or not chosen <= set(GRADIENTS):
        raise InvalidArgumentError(
            f"wanted must be a collection of names from {', '.join(GRADIENTS)}, got {names!r}",
            argument="wanted",
        )
    return Wanted(gx="gx" in chosen, gW="gW" in chosen, gb="gb" in chosen and has_b)
