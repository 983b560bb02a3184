"""vmap over the operators of jax: the batch joins an axis of the operands, so that one call computes all of it.

Which axis depends on the operands that are mapped::

    mapped           the batch joins
    x                n, the samples
    W                c_O, the output channels
    x and W          the groups
    x or W, not gy   c_I, the input channels, in gradients
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import jax.numpy as jnp
from jax.interpreters import batching

from deconvd.model.problem import Problem, TensorSpec, problem_of
from deconvd_client.frameworks.jax_operators import (
    Service,
    bind_deconvolution,
    bind_gradients,
    deconvolution_p,
    gradients_p,
    spec_of_value,
    split_operands,
)

__all__: list[str] = []


@dataclass(frozen=True)
class _Place:
    """Where the batch joins a tensor: on this axis, outside the channels or within each group of them."""

    axis: int
    is_in_groups: bool = False

    def join(self, value: Any, groups: int) -> Any:
        """Merge the first axis of a value, the batch, into the axis."""
        batch, *shape = value.shape
        groups = groups if self.is_in_groups else 1
        before, extent, after = shape[: self.axis], shape[self.axis], shape[self.axis + 1 :]
        value = value.reshape(batch, *before, groups, extent // groups, *after)
        value = jnp.moveaxis(value, 0, self.axis + 1)
        return value.reshape(*before, batch * extent, *after)

    def split(self, value: Any, batch: int, groups: int) -> Any:
        """Undo `join`."""
        groups = groups if self.is_in_groups else 1
        shape = value.shape
        before, extent, after = (
            shape[: self.axis],
            shape[self.axis] // batch,
            shape[self.axis + 1 :],
        )
        value = value.reshape(*before, groups, batch, extent // groups, *after)
        value = jnp.moveaxis(value, self.axis + 1, 0)
        return value.reshape(batch, *before, extent, *after)

    def spec(self, spec: TensorSpec, batch: int) -> TensorSpec:
        shape = list(spec.shape)
        shape[self.axis] *= batch
        return TensorSpec(tuple(shape), spec.dtype)


@dataclass(frozen=True)
class _BatchLayout:
    """Where the batch joins each tensor. None: the tensor is the same for the whole batch."""

    x: _Place | None = None
    W: _Place | None = None
    b: _Place | None = None
    y: _Place | None = None
    multiplies_groups: bool = False

    def service(self, service: Service, batch: int) -> Service:
        return service.with_groups(batch) if self.multiplies_groups else service

    def problem(self, service: Service, problem: Problem, batch: int) -> Problem:
        """Return the problem of the whole batch. `service` is for the whole batch."""
        x = problem.x if self.x is None else self.x.spec(problem.x, batch)
        W = problem.W if self.W is None else self.W.spec(problem.W, batch)
        return problem_of(x, W, service.geometry)


_SAMPLES: Final = _BatchLayout(x=_Place(0), y=_Place(0))
_GROUPS: Final = _BatchLayout(
    x=_Place(1), W=_Place(0), b=_Place(0), y=_Place(1), multiplies_groups=True
)
_OUTPUTS: Final = _BatchLayout(
    W=_Place(1), b=_Place(0, is_in_groups=True), y=_Place(1, is_in_groups=True)
)
_INPUTS: Final = _BatchLayout(x=_Place(1, is_in_groups=True), W=_Place(0, is_in_groups=True))
_SAME: Final = _BatchLayout()


class _MappedOperands:
    """The operands of one operator under vmap: the mapped ones have the batch as their first axis."""

    def __init__(self, operands: Sequence[Any], axes: Sequence[Any]) -> None:
        self.size = next(
            o.shape[axis] for o, axis in zip(operands, axes, strict=True) if axis is not None
        )
        self.values = [
            o if axis is None else jnp.moveaxis(o, axis, 0)
            for o, axis in zip(operands, axes, strict=True)
        ]
        self.is_mapped = [axis is not None for axis in axes]

    def zeros(self, spec: TensorSpec) -> Any:
        """Return the result of an empty batch, which is no call."""
        return jnp.zeros((0, *spec.shape), spec.dtype)

    def sample_spec(self, index: int) -> TensorSpec:
        """Return the shape and the element type of an operand without the batch."""
        spec = spec_of_value(self.values[index])
        return TensorSpec(spec.shape[self.is_mapped[index] :], spec.dtype)

    def spread(self, value: Any, is_mapped: bool) -> Any:
        """Return a value with the batch as its first axis."""
        return value if is_mapped else jnp.broadcast_to(value, (self.size, *value.shape))

    def join(self, place: _Place | None, value: Any, is_mapped: bool, groups: int) -> Any:
        if value is None or place is None:
            return value
        return place.join(self.spread(value, is_mapped), groups)


def _batch_deconvolution(
    operands: Sequence[Any], axes: Sequence[Any], *, service: Service, has_b: bool
) -> tuple[Any, int]:
    batch = _MappedOperands(operands, axes)
    terms, b = split_operands(batch.values, has_b=has_b)
    mapped, is_b_mapped = split_operands(batch.is_mapped, has_b=has_b)
    groups = service.geometry.groups
    if batch.size == 0:
        problem = problem_of(batch.sample_spec(0), batch.sample_spec(1), service.geometry)
        return batch.zeros(problem.y), 0
    total = None
    for (x, W), (is_x, is_W) in zip(terms, mapped, strict=True):
        layout = {
            (True, False): _SAMPLES,
            (True, True): _GROUPS,
            (False, True): _OUTPUTS,
            (False, False): _SAME,
        }[is_x, is_W]
        takes_b = b is not None and (layout.b is not None or not is_b_mapped)
        y = bind_deconvolution(
            layout.service(service, batch.size),
            [
                (
                    batch.join(layout.x, x, is_x, groups),
                    batch.join(layout.W, W, is_W, groups),
                )
            ],
            batch.join(layout.b, b, is_b_mapped, groups) if takes_b else None,
        )
        b = None if takes_b else b
        y = batch.spread(y, False) if layout.y is None else layout.y.split(y, batch.size, groups)
        total = y if total is None else total + y
    if b is not None:
        total = total + b[:, None, :, None, None]
    return total, 0


def _batch_gradients(
    operands: Sequence[Any],
    axes: Sequence[Any],
    *,
    service: Service,
    problem: Problem,
    wanted: tuple[str, ...],
) -> tuple[list[Any], list[int]]:
    batch = _MappedOperands(operands, axes)
    names = ["x"] * ("gW" in wanted) + ["W"] * ("gx" in wanted) + ["gy"]
    values = dict(zip(names, batch.values, strict=True))
    mapped = dict(zip(names, batch.is_mapped, strict=True))
    if batch.size == 0:
        specs = {"gx": problem.x, "gW": problem.W}
        return [batch.zeros(specs[name]) for name in wanted], [0] * len(wanted)
    layouts: dict[_BatchLayout, list[str]] = {}
    for name in wanted:
        layouts.setdefault(_gradient_layout(name, mapped), []).append(name)
    found: dict[str, Any] = {}
    for layout, joint in layouts.items():
        found |= _batch_joint_gradients(batch, layout, service, problem, values, mapped, joint)
    return [found[name] for name in wanted], [0] * len(wanted)


def _gradient_layout(name: str, mapped: dict[str, bool]) -> _BatchLayout:
    operand, alone = ("W", _SAMPLES) if name == "gx" else ("x", _OUTPUTS)
    if mapped["gy"]:
        return _GROUPS if mapped[operand] else alone
    return _INPUTS if mapped[operand] else _SAME


def _batch_joint_gradients(
    batch: _MappedOperands,
    layout: _BatchLayout,
    service: Service,
    problem: Problem,
    values: dict[str, Any],
    mapped: dict[str, bool],
    wanted: list[str],
) -> dict[str, Any]:
    """Return the gradients of one call, each with the batch as its first axis."""
    groups = service.geometry.groups
    whole = layout.service(service, batch.size)
    x = batch.join(layout.x, values["x"], mapped["x"], groups) if "gW" in wanted else None
    W = batch.join(layout.W, values["W"], mapped["W"], groups) if "gx" in wanted else None
    gy = batch.join(layout.y, values["gy"], mapped["gy"], groups)
    found = bind_gradients(whole, layout.problem(whole, problem, batch.size), x, W, gy)
    places = {"gx": layout.x, "gW": layout.W}
    return {
        name: batch.spread(value, False)
        if (place := places[name]) is None
        else place.split(value, batch.size, groups)
        for name, value in found.items()
    }


batching.primitive_batchers[deconvolution_p] = _batch_deconvolution
batching.primitive_batchers[gradients_p] = _batch_gradients
