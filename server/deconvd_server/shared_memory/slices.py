"""Slices of lent memory, as calls name them."""

from __future__ import annotations

from deconvd.errors import InvalidArgumentError
from deconvd.problem import TensorSpec

__all__ = ["check_slice"]


def check_slice(name: str, offset_bytes: int, spec: TensorSpec, size_bytes: int) -> None:
    """Raise InvalidArgumentError unless a tensor may lie at an offset in a region of some size.

    Args:
        name: Name of the argument, for errors.
    """
    if not 0 <= offset_bytes <= size_bytes - spec.nbytes:
        raise InvalidArgumentError(
            f"{name} must lie in its region of {size_bytes} bytes, got {spec.nbytes} bytes at "
            f"offset {offset_bytes}",
            argument=name,
        )
    if offset_bytes % spec.dtype.itemsize:
        raise InvalidArgumentError(
            f"{name} must lie at a multiple of its elements' {spec.dtype.itemsize} bytes, got "
            f"offset {offset_bytes}",
            argument=name,
        )
