"""The tensors that devices compute with: arrays in host memory, and tensors in a device's memory."""

from __future__ import annotations

from typing import Protocol, TypeAlias

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec

__all__ = ["DeviceTensor", "LentMemory", "Tensor"]


class DeviceTensor(Protocol):
    """A tensor in a device's own memory: C-contiguous, in native byte order. Made by `Device.empty`.

    Only its own device accepts it. Other devices raise ValueError, and so does any call once it is freed. The owner
    must not let one call write it while another reads it, and must not free it while a call uses it or a view of it.
    """

    @property
    def spec(self) -> TensorSpec:
        """Its shape and element type."""

    @property
    def device_id(self) -> str:
        """The `DeviceInfo.id` of its device."""

    def samples(self, start: int, stop: int) -> DeviceTensor:
        """Return a view of ``tensor[start:stop]``, where ``0 <= start <= stop <= shape[0]``.

        A view is never freed. It must not be used once the tensor is freed.
        """


class LentMemory(Protocol):
    """A card's memory that another process may open as well. Made by `Device.lend`.

    The other process may change it at any time.
    """

    @property
    def size_bytes(self) -> int:
        """Its size, in bytes."""

    @property
    def handle(self) -> bytes:
        """The ``cudaIpcMemHandle_t`` by which the other process opens it."""

    def tensor(self, spec: TensorSpec, offset_bytes: int) -> DeviceTensor:
        """Return a part of the memory as a tensor, which is never freed."""

    def free(self) -> None:
        """Free the memory. It must be called once, when no call uses a part of it and no other process has it open."""


Tensor: TypeAlias = Array | DeviceTensor
"""A tensor that a device reads or writes: an array in host memory, or a tensor in the device's own memory."""
