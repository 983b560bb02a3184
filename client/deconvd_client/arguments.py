"""What callers give, checked and made into calls."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import ARGUMENTS, DECONVOLVE, DECONVOLVE_GRAD, Operation, spec_of_field
from deconvd.model.problem import Problem, TensorSpec, problem_of, spec_of
from deconvd_client.calls.call_spec import make_request
from deconvd_client.config import Config
from deconvd_client.frameworks.framework import framework_of, host_array
from deconvd_client.residents import Call, RemoteTensor, Resident, ResidentExecutor, SourceArray

__all__ = ["GRADIENT_NAMES", "CallBuilder", "Operand"]

GRADIENT_NAMES: Final = ("gx", "gW", "gb")

Operand = Array | Resident

_MaskedArray: Final = np.ma.MaskedArray


class CallBuilder:
    """Makes calls of a connection's arguments; every method raises InvalidArgumentError.

    Args:
        residents: Whose RemoteTensors are taken.
        config: Says how to compute.
    """

    def __init__(self, residents: ResidentExecutor, config: Config) -> None:
        self._residents = residents
        self._config = config

    def operand(self, name: str, value: object) -> Operand:
        """Return an argument as what calls take: an array, or what the server keeps."""
        if isinstance(value, np.ndarray) and not isinstance(value, _MaskedArray):
            return value
        if isinstance(value, RemoteTensor):
            return value.resident_for(self._residents, name)
        if isinstance(value, Resident):  # of a pullback to be
            return value
        framework = framework_of(value)
        if framework is not None:
            array: Array = framework.to_array(value)
            return array
        raise _wrong_kind_error(name, value)

    def make_resident(self, name: str, value: object) -> Resident:
        """Return an argument as what the server is to keep beyond a call."""
        operand = self.operand(name, value)
        if isinstance(operand, Resident):
            return operand.duplicate()
        array = host_array(operand)
        return Resident(spec_of(array), source=SourceArray(array))

    def deconvolution(
        self, x: object, W: object, b: object, geometry: Geometry, *, stay: bool = False
    ) -> Call:
        """Return the call that computes y."""
        images, filters = self.operand("x", x), self.operand("W", W)
        problem = problem_of(_spec_of(images), _spec_of(filters), geometry)
        operands = {"w": filters}
        if b is not None:
            operands["b"] = self.operand("b", b)
            problem.check_b(_spec_of(operands["b"]))
        operands["x"] = images
        return self._call(DECONVOLVE, problem, operands, {"y": problem.y}, stay, images)

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
        problem = problem_of(_spec_of(images), _spec_of(filters), geometry)
        if b is not None:
            problem.check_b(_spec_of(self.operand("b", b)))
        return self.backward(
            problem, images, filters, gy, wanted, has_b=b is not None, stay=stay, at=images
        )

    def backward(
        self,
        problem: Problem,
        x: Operand,
        W: Operand,
        gy: object,
        wanted: Collection[str],
        *,
        has_b: bool,
        stay: bool = False,
        at: Operand | None = None,
    ) -> Call:
        """Return the call that computes gradients of a problem whose operands are known to fit.

        Args:
            at: As in `Call`; None for gy.
        """
        gradient = self.operand("gy", gy)
        problem.check_gy(_spec_of(gradient))
        given = {"x": x, "w": W, "gy": gradient}
        results = {
            field: spec_of_field(problem, field) for field in _parse_wanted(wanted, has_b=has_b)
        }
        operands = {field: given[field] for field in DECONVOLVE_GRAD.operands_for(results)}
        at = gradient if at is None else at
        return self._call(DECONVOLVE_GRAD, problem, operands, results, stay, at)

    def _call(
        self,
        operation: Operation,
        problem: Problem,
        operands: dict[str, Operand],
        results: dict[str, TensorSpec],
        stay: bool,
        at: Operand,
    ) -> Call:
        options = self._config.options
        request = make_request(operation, problem, options, tuple(results), tuple(operands))
        call = Call(operation, request, problem, operands, results, stay, at)
        return call.with_host_arrays() if stay else call


def _wrong_kind_error(name: str, value: object) -> InvalidArgumentError:
    """Return what is wrong with an argument that is no array, or masked."""
    if isinstance(value, _MaskedArray):
        text = (
            f"{name} must not be a masked array, as its mask would be lost: give {name}.filled(value), "
            f"or {name}.data for what is below the mask"
        )
    else:
        text = (
            f"{name} must be a numpy.ndarray or a RemoteTensor, got {_type_name(value)}"
            f"{_remedy(name, value)}"
        )
    return InvalidArgumentError(text, argument=name)


def _type_name(value: object) -> str:
    kind = type(value)
    if kind.__module__.startswith("PIL."):
        return f"a PIL image ({kind.__qualname__})"
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def _remedy(name: str, value: object) -> str:
    """Return how to make an array of what is none; empty if that cannot be told."""
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


def _spec_of(operand: Operand) -> TensorSpec:
    """Return the shape and element type of an operand."""
    return operand.spec if isinstance(operand, Resident) else spec_of(operand)


def _parse_wanted(names: Collection[str], *, has_b: bool) -> tuple[str, ...]:
    """Return the fields of the gradients that are named, without gb if there is no b."""
    try:
        chosen = None if isinstance(names, str) else set(names)
    except TypeError:
        chosen = None
    if chosen is None or not chosen <= set(GRADIENT_NAMES):
        raise InvalidArgumentError(
            f"wanted must be a collection of names from {', '.join(GRADIENT_NAMES)}, got {names!r}",
            argument="wanted",
        )
    if not has_b:
        chosen.discard("gb")
    fields = tuple(f for f in DECONVOLVE_GRAD.all_results if ARGUMENTS[f] in chosen)
    if not fields:
        allowed = "gx, gW and gb" if has_b else "gx and gW, as there is no b"
        raise InvalidArgumentError(
            f"wanted must name at least one of {allowed}, got {names!r}", argument="wanted"
        )
    return fields
