"""jax arrays with elements: as operands, and results as such arrays."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd_client.frameworks.framework import UnusableArrayError

__all__ = ["array_on_device_of", "operand", "raw_array"]


def raw_array(value: Any) -> Any:
    """Return a view of an array's elements: of numpy on the host; of cupy on a card, if cupy is installed.

    Raises:
        UnusableArrayError: It is a tracer, a key, was deleted, or is on several devices.
    """
    if isinstance(value, jax.core.Tracer):
        raise UnusableArrayError(
            "must not be a tracer, as its elements are not known yet: "
            "inside jit, grad and vmap only deconvolution_2d and deconvolution_2d_grad can be called"
        )
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise UnusableArrayError(f"must not be an array of random keys, got {value.dtype}")
    if not hasattr(value, "is_deleted"):
        return np.asarray(value)  # a constant of a traced function, on no device
    if value.is_deleted():
        raise UnusableArrayError("was deleted, or donated to a compiled function: give another")
    devices = value.devices()
    if len(devices) > 1:
        raise UnusableArrayError(
            f"must be on one device, got an array on {len(devices)}: give jax.device_put(array, device)"
        )
    if next(iter(devices)).platform == "gpu" and find_spec("cupy") is not None:
        import cupy

        return cupy.from_dlpack(value)
    return np.asarray(value)


def operand(name: str, value: Any) -> Any:
    """Return the elements of an argument, as `raw_array` does.

    Raises:
        InvalidArgumentError: The array has no elements that a call could use.
    """
    try:
        return raw_array(value)
    except UnusableArrayError as error:
        raise InvalidArgumentError(f"{name} {error}", argument=name) from error


def array_on_device_of(array: Any, value: Any) -> Any:
    """Return a numpy or cupy array as a jax array on the device of another one, without a copy if possible."""
    elements = array if isinstance(array, np.ndarray) else jax.dlpack.from_dlpack(array)
    return jax.device_put(elements, value.device if hasattr(value, "is_deleted") else None)
