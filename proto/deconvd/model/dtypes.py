"""The element types of tensors, as numpy's dtypes, and arrays of them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from deconvd.errors import InvalidArgumentError

__all__ = [
    "BFLOAT16",
    "ELEMENT_TYPES",
    "Array",
    "DType",
    "compute_type",
    "element_type",
    "native_type",
]

DType = np.dtype[Any]

Array = npt.NDArray[Any]

BFLOAT16: DType = np.dtype(ml_dtypes.bfloat16)

ELEMENT_TYPES: tuple[DType, ...] = (
    np.dtype(np.float16),
    BFLOAT16,
    np.dtype(np.float32),
    np.dtype(np.float64),
)
"""Every element type, narrowest first."""


def native_type(dtype: DType) -> DType:
    """Return `dtype` in native byte order. It can be any type of numpy's."""
    try:
        return dtype.newbyteorder("=")
    except TypeError:  # of strings of any length, say, which have no byte order
        return dtype


def element_type(name: str, dtype: DType) -> DType:
    """Return `dtype` in native byte order.

    Args:
        name: Name of the argument, for the error.

    Raises:
        InvalidArgumentError: It is not one of `ELEMENT_TYPES`.
    """
    native = native_type(dtype)
    if native not in ELEMENT_TYPES:
        allowed = ", ".join(str(allowed) for allowed in ELEMENT_TYPES)
        raise InvalidArgumentError(
            f"{name} must have one of the element types {allowed}, got {dtype}", argument=name
        )
    return native


def compute_type(x: DType, W: DType) -> DType:
    """Return the type in which products of `x` and `W` are computed: the wider of both, and at least float32."""
    wide = np.dtype(np.float64)
    return wide if wide in (x, W) else np.dtype(np.float32)
