"""Tensors that stay in host memory between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from deconvd.copying import copy_into
from deconvd.tensor import Array, spec_of
from deconvd_server.device.tensor import DeviceTensor, Tensor, never

__all__ = ["DEVICE_ID", "HostTensor", "array_of", "own", "plain"]

DEVICE_ID = "cpu"


class HostTensor:
    """A tensor in host memory. See `DeviceTensor`.

    Args:
        whole: The tensor that it is a view of; None if it is none.
    """

    device_id = DEVICE_ID

    def __init__(self, array: Array, whole: HostTensor | None = None) -> None:
        self.spec = spec_of(array)
        self.may_grow: Callable[[int], bool] = never
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
    return operand if isinstance(operand, np.ndarray) else own(operand).array


def own(tensor: DeviceTensor) -> HostTensor:
    """Return a tensor that is ours. Raises ValueError if it is another device's."""
    if not isinstance(tensor, HostTensor):
        raise ValueError(f"a tensor of {tensor.device_id} is of no use to {DEVICE_ID}")
    return tensor


@contextmanager
def plain(place: Tensor) -> Iterator[Array]:
    """Give the block an array to write a result into: the place itself if it is C-contiguous and in native byte order.

    Otherwise what the block has written is copied to the place.
    """
    target = array_of(place)
    if target.flags.c_contiguous and target.dtype.isnative:
        yield target
        return
    array = np.empty(target.shape, target.dtype.newbyteorder("="))
    yield array
    copy_into(target, array)
