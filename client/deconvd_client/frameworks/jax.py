"""The adapter for jax. It is imported only after a caller has given a jax array or a tracer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.gradients import Gradients
from deconvd.model.problem import TensorSpec, problem_of
from deconvd_client.frameworks import jax_batching as jax_batching  # registers the rules of vmap
from deconvd_client.frameworks.framework import Functions
from deconvd_client.frameworks.jax_arrays import array_on_device_of, raw_array
from deconvd_client.frameworks.jax_operators import (
    Service,
    bind_deconvolution,
    bind_gradients,
    spec_of_value,
)

__all__ = ["JaxFramework"]


class JaxFramework:
    """Gives jax arrays to calls, and makes operators of jax of calls with tracers. See `TracingFramework`."""

    def owns(self, value: object) -> bool:
        return isinstance(value, jax.Array)

    def to_array(self, value: Any) -> Any:
        return raw_array(value)

    def from_array(self, array: Array, value: Any) -> Any:
        return array_on_device_of(array, value)

    def is_traced(self, value: Any) -> bool:
        return isinstance(value, jax.core.Tracer)

    def deconvolution_2d(
        self, connection: Functions, x: Any, W: Any, b: Any, geometry: Geometry
    ) -> Any:
        x, W = _parse("x", x), _parse("W", W)
        problem = problem_of(_spec("x", x), _spec("W", W), geometry)
        if b is not None:
            b = _parse("b", b)
            problem.check_b(_spec("b", b))
        return bind_deconvolution(Service(connection, geometry, connection.options), [(x, W)], b)

    def deconvolution_2d_grad(
        self,
        connection: Functions,
        x: Any,
        W: Any,
        b: Any,
        gy: Any,
        geometry: Geometry,
        wanted: tuple[str, ...],
    ) -> Gradients:
        x, W, gy = _parse("x", x), _parse("W", W), _parse("gy", gy)
        problem = problem_of(_spec("x", x), _spec("W", W), geometry)
        if b is not None:
            problem.check_b(_spec("b", _parse("b", b)))
        problem.check_gy(_spec("gy", gy))
        found = bind_gradients(
            Service(connection, geometry, connection.options),
            problem,
            x if "gW" in wanted else None,
            W if "gx" in wanted else None,
            gy,
        )
        gb = jnp.sum(gy, (0, 2, 3)) if "gb" in wanted else None
        return Gradients(found.get("gx"), found.get("gW"), gb)


def _parse(name: str, value: Any) -> Any:
    """Return an operand beside a tracer as jax has it."""
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray):
        return jnp.asarray(value)
    kind = type(value)
    raise InvalidArgumentError(
        f"{name} must be a jax or numpy array if another argument is a tracer of jax, "
        f"got {kind.__module__}.{kind.__qualname__}",
        argument=name,
    )


def _spec(name: str, value: Any) -> TensorSpec:
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise InvalidArgumentError(
            f"{name} must not be an array of random keys, got {value.dtype}", argument=name
        )
    return spec_of_value(value)
