"""The adapter for cupy. It is imported only after a caller has given a cupy array."""

from __future__ import annotations

from typing import Any

import cupy

from deconvd.model.dtypes import Array

__all__ = ["CupyFramework", "array_from_dlpack"]


def array_from_dlpack(tensor: Any) -> Any:
    """Return another library's tensor on a card as a cupy array in the same memory.

    Cupy's current stream waits for what is enqueued on the library's current stream.
    """
    with cupy.cuda.Device(tensor.__dlpack_device__()[1]):
        return cupy.from_dlpack(tensor)


class CupyFramework:
    """Gives cupy arrays to calls as they are, because calls read the memory of cards. See `Framework`."""

    def owns(self, value: object) -> bool:
        return isinstance(value, cupy.ndarray)

    def to_array(self, value: Any) -> Any:
        return value

    def from_array(self, array: Array, value: Any) -> Any:
        # asarray copies only if the result is on another device than `value`
        with cupy.cuda.Device(value.device.id):
            return cupy.asarray(array)
