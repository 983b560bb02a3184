"""Tensors on a card, and memory of the card that another process opens."""

from __future__ import annotations

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.memory import Lease
from deconvd_server.device.tensor import DeviceTensor

__all__ = ["CudaLentMemory", "CudaTensor", "as_cuda_tensor"]


class CudaTensor:
    """A tensor on a card. See `DeviceTensor`.

    Args:
        lease: The memory that has the tensor.
        offset_bytes: Where the tensor begins in that memory.
    """

    __slots__ = ("_lease", "_offset_bytes", "device_id", "spec")  # many are small, and kept

    def __init__(
        self, spec: TensorSpec, device_id: str, lease: Lease, offset_bytes: int = 0
    ) -> None:
        self.spec = spec
        self.device_id = device_id
        self._lease = lease
        self._offset_bytes = offset_bytes

    @property
    def pointer(self) -> int:
        """Its address on the card. It is a multiple of 256, except for a view."""
        return self._lease.pointer + self._offset_bytes

    def samples(self, start: int, stop: int) -> CudaTensor:
        """Return a view of some samples. See `DeviceTensor`."""
        shape = self.spec.shape
        sample = TensorSpec(shape[1:], self.spec.dtype)
        offset_bytes = self._offset_bytes + start * sample.nbytes
        spec = TensorSpec((stop - start, *shape[1:]), self.spec.dtype)
        return CudaTensor(spec, self.device_id, self._lease, offset_bytes)

    def free(self) -> None:
        """Free the memory. It must be called once."""
        self._lease.free()


class CudaLentMemory:
    """Memory of a card that another process opens. See `LentMemory`."""

    def __init__(self, device_id: str, lease: Lease, size_bytes: int, handle: bytes) -> None:
        self.size_bytes = size_bytes
        self.handle = handle
        self._device_id = device_id
        self._lease = lease

    def tensor(self, spec: TensorSpec, offset_bytes: int) -> CudaTensor:
        """Return a part of the memory as a tensor. See `LentMemory`."""
        return CudaTensor(spec, self._device_id, self._lease, offset_bytes)

    def free(self) -> None:
        """Free the memory. It must be called once."""
        self._lease.free()


def as_cuda_tensor(tensor: DeviceTensor, device_id: str) -> CudaTensor:
    """Return a tensor as one of a card. Raises ValueError if it is on another device."""
    if not isinstance(tensor, CudaTensor) or tensor.device_id != device_id:
        raise ValueError(f"the tensor is on {tensor.device_id}, and cannot be used on {device_id}")
    return tensor
