"""The deconvolution and its gradients as two operators of jax, which it can differentiate and compile.

`deconvolution_p` is a sum of deconvolutions, because the derivative of one is such a sum::

    d deconv(x, W) = deconv(dx, W) + deconv(x, dW)

`gradients_p` is gx and gW of one deconvolution, by one call. Both are linear in each operand, and their derivatives
consist of the same two operators. So derivatives of any order exist, in forward and in reverse mode. gb is a sum,
which jax computes.

Operands with elements are computed at once. In compiled functions the calls are callbacks. `jax_batching` has the rules
for vmap.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import zip_longest
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, problem_of
from deconvd_client.frameworks.framework import Functions
from deconvd_client.frameworks.jax_arrays import array_on_device_of, operand

__all__ = [
    "Service",
    "bind_deconvolution",
    "bind_gradients",
    "deconvolution_p",
    "gradients_p",
    "spec_of_value",
    "split_operands",
]

Terms = Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class Service:
    """What computes a call, and how. Hashable, because jax compares the parameters of operators.

    Attributes:
        connection: Makes the call.
        geometry: How the filter moves.
        options: The options when the function was traced. The thread that makes the call can have others.
    """

    connection: Functions
    geometry: Geometry
    options: Options

    def with_groups(self, factor: int) -> Service:
        groups = self.geometry.groups * factor
        return replace(self, geometry=replace(self.geometry, groups=groups))

    def compute_sum(self, *operands: Any, has_b: bool) -> Any:
        """Return the sum of deconvolutions, for numpy or cupy arrays."""
        terms, b = split_operands(operands, has_b=has_b)
        with self._options_set():
            arguments = self.geometry.arguments
            y = self.connection.deconvolution_2d(*terms[0], b, **arguments)
            for x, W in terms[1:]:
                y += self.connection.deconvolution_2d(x, W, **arguments)
        return y

    def compute_gradients(
        self, *operands: Any, problem: Problem, wanted: tuple[str, ...]
    ) -> list[Any]:
        """Return the gradients that are wanted, for numpy or cupy arrays."""
        x, W, gy = _named_operands(operands, wanted)
        # of operands that are not needed, only the shape and the element type matter
        xp: Any = np if isinstance(gy, np.ndarray) else sys.modules["cupy"]
        if x is None:
            x = xp.broadcast_to(xp.zeros((), problem.x.dtype), problem.x.shape)
        if W is None:
            W = xp.broadcast_to(xp.zeros((), problem.W.dtype), problem.W.shape)
        with self._options_set():
            found = self.connection.deconvolution_2d_grad(
                x, W, None, gy, **self.geometry.arguments, wanted=wanted
            )
        return [gradient for gradient in found if gradient is not None]

    def _options_set(self) -> ExitStack:
        stack = ExitStack()
        if self.connection.options != self.options:
            for field in fields(Options):
                value = getattr(self.options, field.name)
                stack.enter_context(self.connection.using_config(field.name, value))
        return stack


def spec_of_value(value: Any) -> TensorSpec:
    """Return the shape and the element type of an array, a tracer or an abstract value."""
    return TensorSpec(tuple(value.shape), np.dtype(value.dtype))


def bind_deconvolution(service: Service, terms: Terms, b: Any = None) -> Any:
    """Return the sum of the deconvolutions of all pairs (x, W), plus b. b can be None."""
    operands = [operand for term in terms for operand in term]
    if b is not None:
        operands.append(b)
    return deconvolution_p.bind(*operands, service=service, has_b=b is not None)


def bind_gradients(service: Service, problem: Problem, x: Any, W: Any, gy: Any) -> dict[str, Any]:
    """Return gx if W is given, and gW if x is given, by name."""
    wanted = tuple(name for name, needed in (("gx", W), ("gW", x)) if needed is not None)
    if not wanted:
        return {}
    operands = [value for value in (x, W, gy) if value is not None]
    found = gradients_p.bind(*operands, service=service, problem=problem, wanted=wanted)
    return dict(zip(wanted, found, strict=True))


def split_operands(operands: Sequence[Any], *, has_b: bool) -> tuple[list[tuple[Any, Any]], Any]:
    """Return the terms and b of `deconvolution_p`."""
    b = operands[-1] if has_b else None
    flat = operands[:-1] if has_b else operands
    return list(zip(flat[::2], flat[1::2], strict=True)), b


def _named_operands(operands: Sequence[Any], wanted: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """Return x, W and gy of `gradients_p`. x is None if gW is not wanted, W if gx is not."""
    remaining = iter(operands)
    x = next(remaining) if "gW" in wanted else None
    W = next(remaining) if "gx" in wanted else None
    return x, W, next(remaining)


def _register_callback(
    primitive: Any, compute: Callable[..., Any], shapes: Callable[..., Any]
) -> None:
    """Have an operator computed by a callback in compiled functions.

    Args:
        compute: Returns the results for numpy arrays and the operator's parameters, in a sequence.
        shapes: Returns the abstract values of the results for those of the operands.
    """

    def call(*operands: Any, **params: Any) -> Any:
        def compute_here(*values: Any) -> Any:
            return compute(*map(np.asarray, values), **params)

        avals = shapes(*map(jax.typeof, operands), **params)
        return jax.pure_callback(compute_here, avals, *operands, vmap_method="sequential")

    lower_for_any_devices = mlir.lower_fun(call, multiple_results=True)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        module = context.module_context
        is_plain = isinstance(module.axis_context, mlir.ShardingContext)
        if not is_plain or module.axis_context.num_devices > 1 or len(module.platforms) > 1:
            return lower_for_any_devices(context, *operands, **params)
        # As `pure_callback` does, but that puts the operands on a device before each call, which takes 0.2 ms.
        results, *_ = mlir.emit_python_callback(
            context,
            partial(compute, **params),
            None,
            list(operands),
            context.avals_in,
            context.avals_out,
            has_side_effect=False,
        )
        return results

    mlir.register_lowering(primitive, lower)


def _is_zero(tangent: object) -> bool:
    return tangent is None or type(tangent) is ad.Zero


def _add(total: Any, value: Any) -> Any:
    return value if total is None else total + value


# deconvolution_p: x1, W1, x2, W2, ..., b -> y

deconvolution_p: Final[Any] = Primitive("deconvd_deconvolution")


def _compute_deconvolution(*operands: Any, service: Service, has_b: bool) -> Any:
    names = ["x", "W"] * (len(operands) // 2) + ["b"] * has_b
    arrays = map(operand, names, operands)
    return array_on_device_of(service.compute_sum(*arrays, has_b=has_b), operands[0])


def _deconvolution_shape(*avals: Any, service: Service, **_: Any) -> Any:
    problem = problem_of(spec_of_value(avals[0]), spec_of_value(avals[1]), service.geometry)
    return avals[0].update(shape=problem.y.shape, weak_type=False)


def _call_deconvolution(*values: Any, service: Service, has_b: bool) -> tuple[Any]:
    return (service.compute_sum(*values, has_b=has_b),)


deconvolution_p.def_impl(_compute_deconvolution)
deconvolution_p.def_abstract_eval(_deconvolution_shape)
_register_callback(
    deconvolution_p,
    _call_deconvolution,
    lambda *avals, **params: [_deconvolution_shape(*avals, **params)],
)


def _differentiate_deconvolution(
    primals: Sequence[Any], tangents: Sequence[Any], *, service: Service, has_b: bool
) -> tuple[Any, Any]:
    y = deconvolution_p.bind(*primals, service=service, has_b=has_b)
    terms, _ = split_operands(primals, has_b=has_b)
    changes, db = split_operands(tangents, has_b=has_b)
    db = None if _is_zero(db) else db
    total = None
    for (x, W), (dx, dW) in zip(terms, changes, strict=True):
        pairs = [(dx, W)] * (not _is_zero(dx)) + [(x, dW)] * (not _is_zero(dW))
        if pairs:
            total = _add(total, bind_deconvolution(service, pairs, db))
            db = None
    if db is not None:
        total = _add(total, jnp.broadcast_to(db[:, None, None], y.shape))
    return y, ad.Zero(jax.typeof(y)) if total is None else total


ad.primitive_jvps[deconvolution_p] = _differentiate_deconvolution


def _transpose_deconvolution(gy: Any, *operands: Any, service: Service, has_b: bool) -> list[Any]:
    is_linear = [ad.is_undefined_primal(operand) for operand in operands]
    if _is_zero(gy):
        return [
            ad.Zero(o.aval) if linear else None
            for o, linear in zip(operands, is_linear, strict=True)
        ]
    results: list[Any] = [None] * len(operands)
    terms_count = len(operands) // 2
    x_slots = [2 * i for i in range(terms_count) if is_linear[2 * i]]
    W_slots = [2 * i + 1 for i in range(terms_count) if is_linear[2 * i + 1]]
    x_aval, W_aval = (
        o.aval if linear else o for o, linear in zip(operands[:2], is_linear, strict=False)
    )
    problem = problem_of(spec_of_value(x_aval), spec_of_value(W_aval), service.geometry)
    for x_slot, W_slot in zip_longest(x_slots, W_slots):
        x = None if W_slot is None else operands[W_slot - 1]
        W = None if x_slot is None else operands[x_slot + 1]
        found = bind_gradients(service, problem, x, W, gy)
        if x_slot is not None:
            results[x_slot] = found["gx"]
        if W_slot is not None:
            results[W_slot] = found["gW"]
    if has_b and is_linear[-1]:
        results[-1] = jnp.sum(gy, (0, 2, 3))
    return results


ad.primitive_transposes[deconvolution_p] = _transpose_deconvolution


# gradients_p: x if gW is wanted, W if gx is wanted, gy -> gx, gW

gradients_p: Final[Any] = Primitive("deconvd_gradients")
gradients_p.multiple_results = True


def _compute_gradients(
    *operands: Any, service: Service, problem: Problem, wanted: tuple[str, ...]
) -> list[Any]:
    names = ["x"] * ("gW" in wanted) + ["W"] * ("gx" in wanted) + ["gy"]
    arrays = map(operand, names, operands)
    found = service.compute_gradients(*arrays, problem=problem, wanted=wanted)
    return [array_on_device_of(gradient, operands[-1]) for gradient in found]


def _gradients_shapes(
    *avals: Any, problem: Problem, wanted: tuple[str, ...], **_: Any
) -> list[Any]:
    specs = {"gx": problem.x, "gW": problem.W}
    return [
        avals[-1].update(shape=specs[name].shape, dtype=specs[name].dtype, weak_type=False)
        for name in wanted
    ]


def _call_gradients(*values: Any, service: Service, **params: Any) -> list[Any]:
    return service.compute_gradients(*values, **params)


gradients_p.def_impl(_compute_gradients)
gradients_p.def_abstract_eval(_gradients_shapes)
_register_callback(gradients_p, _call_gradients, _gradients_shapes)


def _differentiate_gradients(
    primals: Sequence[Any],
    tangents: Sequence[Any],
    *,
    service: Service,
    problem: Problem,
    wanted: tuple[str, ...],
) -> tuple[list[Any], list[Any]]:
    results = gradients_p.bind(*primals, service=service, problem=problem, wanted=wanted)
    x, W, gy = _named_operands(primals, wanted)
    dx, dW, dgy = (None if _is_zero(t) else t for t in _named_operands(tangents, wanted))
    found = bind_gradients(service, problem, dx, dW, gy)
    if dgy is not None:
        for name, value in bind_gradients(service, problem, x, W, dgy).items():
            found[name] = _add(found.get(name), value)
    zeros = (ad.Zero(jax.typeof(result)) for result in results)
    return results, [found.get(name, zero) for name, zero in zip(wanted, zeros, strict=True)]


ad.primitive_jvps[gradients_p] = _differentiate_gradients


def _transpose_gradients(
    cotangents: Sequence[Any],
    *operands: Any,
    service: Service,
    problem: Problem,
    wanted: tuple[str, ...],
) -> list[Any]:
    x, W, gy = _named_operands(operands, wanted)
    given = {n: c for n, c in zip(wanted, cotangents, strict=True) if not _is_zero(c)}
    ggx, ggW = given.get("gx"), given.get("gW")
    results: dict[str, Any] = {}
    if ad.is_undefined_primal(gy):
        terms = [(ggx, W)] * (ggx is not None) + [(x, ggW)] * (ggW is not None)
        if terms:
            results["gy"] = bind_deconvolution(service, terms)
    else:
        # linear in W, of which gx is computed, and in x, of which gW is
        found = bind_gradients(
            service,
            problem,
            ggx if W is not None and ad.is_undefined_primal(W) else None,
            ggW if x is not None and ad.is_undefined_primal(x) else None,
            gy,
        )
        results = {"x": found.get("gx"), "W": found.get("gW")}
    names = ["x"] * ("gW" in wanted) + ["W"] * ("gx" in wanted) + ["gy"]
    return [
        (ad.Zero(value.aval) if results.get(name) is None else results[name])
        if ad.is_undefined_primal(value)
        else None
        for name, value in zip(names, operands, strict=True)
    ]


ad.primitive_transposes[gradients_p] = _transpose_gradients
