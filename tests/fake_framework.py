"""A framework of nobody's: arrays that are none of numpy's, and share their memory by DLPack or are on a "card"."""

from __future__ import annotations

from typing import Any

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["FakeCardTensor", "FakeFramework", "FakeTensor"]


class FakeTensor:
    """An array in the host's memory, which others see by DLPack alone. It belongs to a device by name."""

    def __init__(self, array: Array, device: str = "here") -> None:
        self.device = device
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


class FakeCardTensor:
    """An array whose elements the host can have by a copy alone, as with those of a card."""

    def __init__(self, array: Array) -> None:
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self.copies_count = 0
        self._array = array

    def get(self) -> Array:
        """Return a copy on the host, as cupy's arrays do."""
        self.copies_count += 1
        return self._array.copy()


class FakeFramework:
    """See `deconvd_client.frameworks.framework.Framework`. It counts what it has turned into arrays."""

    def __init__(self) -> None:
        self.arrays_count = 0

    def owns(self, value: object) -> bool:
        return isinstance(value, (FakeTensor, FakeCardTensor))

    def to_array(self, value: Any) -> Any:
        self.arrays_count += 1
        return np.from_dlpack(value) if isinstance(value, FakeTensor) else value

    def from_array(self, array: Array, value: Any) -> Any:
        return FakeTensor(array, value.device)
