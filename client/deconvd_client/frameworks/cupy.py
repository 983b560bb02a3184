"""cupy's arrays, which calls take as they are. Imported once a caller has handed one over, and not before."""

from __future__ import annotations

from typing import Any

import cupy

from deconvd.model.dtypes import Array

__all__ = ["CupyFramework"]


class CupyFramework:
    """See `Framework`."""

    def owns(self, value: object) -> bool:
        """Return whether a value is an array of cupy's."""
        return isinstance(value, cupy.ndarray)

    def to_array(self, value: Any) -> Any:
        """Return the array itself: calls know it."""
        return value

    def from_array(self, array: Array, value: Any) -> Any:
        """Return an array on the card of `value`: itself if it is there."""
        with cupy.cuda.Device(value.device.id):
            return cupy.asarray(array)
