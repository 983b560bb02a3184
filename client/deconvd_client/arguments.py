"""Checks the arguments of a connection's functions, and makes calls of them."""

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
    """Makes calls of the arguments of a connection's functions. Every method raises InvalidArgumentError.

    Args:
        residents: The executor whose RemoteTensors are accepted.
        config: The options for the calls.
    """

    def __init__(self, residents: ResidentExecutor, config: Config) -> None:
        self._residents = residents
        self._config = config

    def parse_operand(self, name: str, value: object) -> tuple[Operand, TensorSpec]:
        """Return an argument as an operand of a call, an array or a resident, and its shape and element type."""
        if isinstance(value, np.ndarray) and not isinstance(value, _MaskedArray):
            return value, spec_of(value)
        if isinstance(value, RemoteTensor):
            value = value.resident_for(self._residents, name)
        if isinstance(value, Resident):
            return value, value.spec
        framework = framework_of(value)
        if framework is None:
            raise _wrong_kind_error(name, value)
        array: Array = framework.to_array(value)
        return array, spec_of(array)

    def make_resident(self, name: str, value: object) -> Resident:
        """Return an argument as a resident, which outlives the call."""
        operand, spec = self.parse_operand(name, value)
        if isinstance(operand, Resident):
            return operand.duplicate()
        return Resident(spec, source=SourceArray(host_array(operand)))

    def deconvolution(
        self, x: object, W: object, b: object, geometry: Geometry, *, keep_results: bool = False
    ) -> Call:
        """Return the call that computes y."""
        images, x_spec = self.parse_operand("x", x)
        filters, W_spec = self.parse_operand("W", W)
        problem = problem_of(x_spec, W_spec, geometry)
        operands = {"w": filters}
        if b is not None:
            operands["b"], b_spec = self.parse_operand("b", b)
            problem.check_b(b_spec)
        operands["x"] = images
        return self._call(DECONVOLVE, problem, operands, {"y": problem.y}, keep_results, images)

    def differentiation(
        self,
        x: object,
        W: object,
        b: object,
        gy: object,
        geometry: Geometry,
        wanted: Collection[str],
        *,
        keep_results: bool = False,
    ) -> Call:
        """Return the call that computes gradients. Of b, only the shape and the element type matter."""
        images, x_spec = self.parse_operand("x", x)
        filters, W_spec = self.parse_operand("W", W)
        problem = problem_of(x_spec, W_spec, geometry)
        if b is not None:
            problem.check_b(self.parse_operand("b", b)[1])
        return self.backward(
            problem,
            images,
            filters,
            gy,
            wanted,
            has_b=b is not None,
            keep_results=keep_results,
            results_like=images,
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
        keep_results: bool = False,
        results_like: Operand | None = None,
    ) -> Call:
        """Return the call that computes gradients of a problem. x and W must be those of the problem.

        Args:
            results_like: As in `Call`; None for gy.
        """
        gradient, gy_spec = self.parse_operand("gy", gy)
        problem.check_gy(gy_spec)
        given = {"x": x, "w": W, "gy": gradient}
        results = {
            field: spec_of_field(problem, field) for field in _parse_wanted(wanted, has_b=has_b)
        }
        operands = {field: given[field] for field in DECONVOLVE_GRAD.operands_for(results)}
        like = gradient if results_like is None else results_like
        return self._call(DECONVOLVE_GRAD, problem, operands, results, keep_results, like)

    def _call(
        self,
        operation: Operation,
        problem: Problem,
        operands: dict[str, Operand],
        results: dict[str, TensorSpec],
        keep_results: bool,
        results_like: Operand,
    ) -> Call:
        options = self._config.options
        request = make_request(operation, problem, options, tuple(results), tuple(operands))
        call = Call(operation, request, problem, operands, results, keep_results, results_like)
        return call.with_host_arrays() if keep_results else call


def _wrong_kind_error(name: str, value: object) -> InvalidArgumentError:
    """Return the error for an argument that is not an array, or is a masked one."""
    if isinstance(value, _MaskedArray):
        text = (
            f"{name} must not be a masked array, as its mask would be lost: give {name}.filled(value), "
            f"or {name}.data for what is below the mask"
        )
    else:
        text = (
            f"{name} must be a numpy or cupy array, or a RemoteTensor, got {_type_name(value)}"
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
    """Return how to convert a value to an array; empty if that is not known."""
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


def _parse_wanted(names: Collection[str], *, has_b: bool) -> tuple[str, ...]:
    """Return the fields of the gradients that are wanted, without gb if there is no b."""
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
