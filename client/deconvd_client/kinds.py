"""Kinds of arrays that callers hand over. A framework is touched only if one of its arrays came already."""

from __future__ import annotations

import sys

__all__ = ["is_from_cupy"]


def is_from_cupy(value: object) -> bool:
    """Return whether a value is a cupy array."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)
