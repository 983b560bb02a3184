"""Kinds of arrays that callers hand over. A framework is touched only if one of its arrays came already."""

from __future__ import annotations

import sys

__all__ = ["is_from_cupy"]


def is_from_cupy(*values: object) -> bool:
    """Return whether any of some values is a cupy array."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and any(isinstance(value, cupy.ndarray) for value in values)
