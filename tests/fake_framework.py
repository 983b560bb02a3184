"""Frameworks of nobody's: arrays that are none of numpy's, but share memory by DLPack, are on a "card" or traced."""

from __future__ import annotations

from typing import Any

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.gradients import Gradients
from deconvd_client.frameworks.framework import Functions, UnusableArrayError

__all__ = [
    "FakeCardTensor",
    "FakeFramework",
    "FakeTensor",
    "FakeTracer",
    "FakeTracingFramework",
]


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


class FakeTracer:
    """An array that is recorded, as torch's are that require gradients. Without one, its elements come later."""

    def __init__(self, array: Array | None) -> None:
        self.array = array


class FakeTracingFramework:
    """See `deconvd_client.frameworks.framework.TracingFramework`. It keeps what it has recorded."""

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []

    def owns(self, value: object) -> bool:
        return isinstance(value, (FakeTensor, FakeTracer))

    def to_array(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return np.from_dlpack(value)
        if value.array is None:
            raise UnusableArrayError("must not be a tracer: its elements are not known yet")
        return value.array

    def from_array(self, array: Array, value: Any) -> Any:
        return FakeTensor(array)

    def is_traced(self, value: Any) -> bool:
        return isinstance(value, FakeTracer)

    def deconvolution_2d(
        self, connection: Functions, x: Any, W: Any, b: Any, geometry: Geometry
    ) -> Any:
        self.records.append(("deconvolution_2d", geometry))
        x, W, b = map(self._elements, (x, W, b))
        return FakeTracer(connection.deconvolution_2d(x, W, b, **geometry.arguments))

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
        self.records.append(("deconvolution_2d_grad", geometry, wanted))
        x, W, b, gy = map(self._elements, (x, W, b, gy))
        gradients = connection.deconvolution_2d_grad(
            x, W, b, gy, **geometry.arguments, wanted=wanted
        )
        tracers: Any = (None if found is None else FakeTracer(found) for found in gradients)
        return Gradients(*tracers)

    def _elements(self, value: Any) -> Any:
        return self.to_array(value) if isinstance(value, FakeTracer) else value
