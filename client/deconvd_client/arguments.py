"""Checks the arguments of a connection's functions, and makes calls of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import ARGUMENTS, DECONVOLVE, DECONVOLVE_GRAD, Operation, spec_of_field
from deconvd.model.problem import Problem, TensorSpec, problem_of, spec_of
from deconvd_client.array_conversion import to_numpy
from deconvd_client.calls.call_spec import make_request
from deconvd_client.config import Config
from deconvd_client.frameworks.framework import UnusableArrayError, framework_of, host_array
from deconvd_client.residents import Call, RemoteTensor, Resident, ResidentStore, SourceArray

__all__ = [
    "GRADIENT_NAMES",
    "CallBuilder",
    "Operand",
    "SupportsArray",
    "TensorLike",
    "parse_wanted",
]

GRADIENT_NAMES: Final = ("gx", "gW", "gb")

Operand = Array | Resident


class SupportsArray(Protocol):
    """An array of any library, a RemoteTensor, or another object that numpy can make an array of."""

    def __array__(self) -> Any: ...


TensorLike: TypeAlias = SupportsArray | list[Any] | tuple[Any, ...]
"""What callers can give as an operand, for type checkers. It has no numbers: most of those are mistakes."""

_MaskedArray: Final = np.ma.MaskedArray


class CallBuilder:
    """Makes calls of the arguments of a connection's functions. Every method raises InvalidArgumentError.

    Args:
        residents: The store whose RemoteTensors are accepted.
        config: The options for the calls.
    """

    def __init__(self, residents: ResidentStore, config: Config) -> None:
        self._residents = residents
        self._config = config

    def parse_operand(self, name: str, value: object) -> tuple[Operand, TensorSpec]:
        """Return an argument as an operand of a call, an array or a resident, and its shape and element type."""
        if isinstance(value, np.ndarray) and not isinstance(value, _MaskedArray):
            if type(value) is not np.ndarray:
                # a view without the methods of the subclass: a numpy.matrix, say, cannot be flattened to be sent
                value = np.asarray(value)
            return value, spec_of(value)
        if isinstance(value, RemoteTensor):
            value = value.resident_for(self._residents, name)
        if isinstance(value, Resident):
            return value, value.spec
        framework = framework_of(value)
        try:
            array: Array = framework.to_array(value) if framework else to_numpy(name, value)
        except UnusableArrayError as error:
            raise InvalidArgumentError(f"{name} {error}", argument=name) from error
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

    def check_double_backward(
        self, x: object, W: object, gradients: Mapping[str, object], geometry: Geometry
    ) -> Problem:
        """Check the arguments of `Connection.deconvolution_2d_double_grad`, and return the problem.

        Args:
            gradients: gy, ggx, ggW and ggb, by name; None for those that are zero.
        """
        problem = problem_of(self.parse_operand("x", x)[1], self.parse_operand("W", W)[1], geometry)
        expected = {"gy": problem.y, "ggx": problem.x, "ggW": problem.W, "ggb": problem.b}
        for name, value in gradients.items():
            if value is not None:
                spec = self.parse_operand(name, value)[1]
                if spec != expected[name]:
                    raise InvalidArgumentError(
                        f"{name} must have the shape and element type of {name[1:]}: {expected[name]}, got {spec}",
                        argument=name,
                    )
        return problem

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
        names = parse_wanted(wanted, has_b=has_b)
        fields = (field for field in DECONVOLVE_GRAD.all_results if ARGUMENTS[field] in names)
        results = {field: spec_of_field(problem, field) for field in fields}
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


def parse_wanted(names: Collection[str], *, has_b: bool) -> tuple[str, ...]:
    """Return the names of the gradients that are wanted, in order, without gb if there is no b.

    Raises:
        InvalidArgumentError: There is another name, or no gradient is left.
    """
    chosen = parse_names(names, GRADIENT_NAMES)
    if not has_b:
        chosen = tuple(name for name in chosen if name != "gb")
    if not chosen:
        allowed = "gx, gW and gb" if has_b else "gx and gW, as there is no b"
        raise InvalidArgumentError(
            f"wanted must name at least one of {allowed}, got {names!r}", argument="wanted"
        )
    return chosen


def parse_names(names: Collection[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the gradients that are wanted, in order. Raises InvalidArgumentError if one is not known."""
    try:
        chosen = None if isinstance(names, str) else set(names)
    except TypeError:
        chosen = None
    if chosen is None or not chosen <= set(known):
        raise InvalidArgumentError(
            f"wanted must be a collection of names from {', '.join(known)}, got {names!r}",
            argument="wanted",
        )
    return tuple(name for name in known if name in chosen)
