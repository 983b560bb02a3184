"""The CPU device's tensors, which are arrays in host memory."""

from __future__ import annotations

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec, spec_of
from deconvd_server.device.tensor import DeviceTensor, Tensor

__all__ = ["DEVICE_ID", "HostTensor", "array_of", "as_host_tensor", "make_contiguous_target"]

DEVICE_ID = "cpu"


class HostTensor:
    """A tensor in host memory. See `DeviceTensor`.

    Args:
        whole: The tensor that this is a view of; None if it is not a view.
        spec: The array's spec, if the caller has it already.
    """

    __slots__ = ("_array", "_whole", "spec")  # many are small, and kept

    device_id = DEVICE_ID

    def __init__(
        self, array: Array, whole: HostTensor | None = None, spec: TensorSpec | None = None
    ) -> None:
        self.spec = spec or spec_of(array)
        self._array: Array | None = array
        self._whole = whole or self

    @property
    def array(self) -> Array:
        """Its elements: C-contiguous, in native byte order."""
        if self._array is None or self._whole._array is None:  # a view ends with its tensor
            raise ValueError("the tensor is freed")
        return self._array

    def samples(self, start: int, stop: int) -> HostTensor:
        """Return a view of some samples. See `DeviceTensor`."""
        return HostTensor(self.array[start:stop], self._whole)

    def free(self) -> None:
        """Free the memory. It must be called once."""
        if self._array is None:
            raise ValueError("the tensor is freed already")
        self._array = None


def array_of(operand: Tensor) -> Array:
    return operand if isinstance(operand, np.ndarray) else as_host_tensor(operand).array


def as_host_tensor(tensor: DeviceTensor) -> HostTensor:
    """Return a tensor as one of the CPU device. Raises ValueError if it is on another device."""
    if not isinstance(tensor, HostTensor):
        raise ValueError(f"the tensor is on {tensor.device_id}, and cannot be used on {DEVICE_ID}")
    return tensor


def make_contiguous_target(target: Array) -> Array:
    """Return an array for a result: the target if it is C-contiguous and in native byte order, else a new one."""
    if target.flags.c_contiguous and target.dtype.isnative:
        return target
    return np.empty(target.shape, target.dtype.newbyteorder("="))
