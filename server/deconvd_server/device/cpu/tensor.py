"""Tensors that stay in host memory between calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec, spec_of
from deconvd_server.device.tensor import DeviceTensor, Tensor, refuse_growth

__all__ = ["DEVICE_ID", "HostTensor", "array_of", "as_host_tensor", "make_contiguous_target"]

DEVICE_ID = "cpu"


class HostTensor:
    """A tensor in host memory. See `DeviceTensor`.

    Args:
        whole: The tensor that it is a view of; None if it is none.
        spec: The array's, if it is known.
    """

    __slots__ = ("_array", "_whole", "may_grow", "spec")  # many are small, and kept

    device_id = DEVICE_ID

    def __init__(
        self, array: Array, whole: HostTensor | None = None, spec: TensorSpec | None = None
    ) -> None:
        self.spec = spec or spec_of(array)
        self.may_grow: Callable[[int], bool] = refuse_growth
        self._array: Array | None = array
        self._whole = whole or self

    @property
    def array(self) -> Array:
        """Its elements: C-contiguous, in native byte order."""
        if self._array is None or self._whole._array is None:
            raise ValueError("the tensor is freed")
        return self._array

    def samples(self, start: int, stop: int) -> HostTensor:
        """Return a view of some samples. See `DeviceTensor`."""
        return HostTensor(self.array[start:stop], self._whole)

    def free(self) -> None:
        """Give the memory back, once."""
        if self._array is None:
            raise ValueError("the tensor is freed already")
        self._array = None


def array_of(operand: Tensor) -> Array:
    """Return the elements of an operand or a place."""
    return operand if isinstance(operand, np.ndarray) else as_host_tensor(operand).array


def as_host_tensor(tensor: DeviceTensor) -> HostTensor:
    """Return a tensor that is ours. Raises ValueError if it is another device's."""
    if not isinstance(tensor, HostTensor):
        raise ValueError(f"a tensor of {tensor.device_id} is of no use to {DEVICE_ID}")
    return tensor


def make_contiguous_target(target: Array) -> Array:
    """Return what a result can be written into: the target if it is C-contiguous and native, else a new array."""
    if target.flags.c_contiguous and target.dtype.isnative:
        return target
    return np.empty(target.shape, target.dtype.newbyteorder("="))
