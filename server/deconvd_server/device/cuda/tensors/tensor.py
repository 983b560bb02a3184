"""Tensors on a card, and memory of the card that another process opens."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from deconvd.model.problem import TensorSpec
from deconvd_server.device.cuda.api.memory import Lease
from deconvd_server.device.cuda.plan import Prepacking
from deconvd_server.device.cuda.tensors.prepacking import PrepackedForms
from deconvd_server.device.tensor import DeviceTensor, refuse_growth

__all__ = ["CudaLentMemory", "CudaTensor", "as_cuda_tensor"]


class CudaTensor:
    """A tensor on a card. See `DeviceTensor`.

    Args:
        lease: The memory that has the tensor.
        offset_bytes: Where the tensor begins in that memory.

    Attributes:
        prepacked: The forms that plans have made of it; None for a view.
        prepackings: How the plans of its calls prepack it, by kinds of calls; None for a plan that does not.
    """

    __slots__ = (  # many are small, and kept
        "_lease",
        "_offset_bytes",
        "device_id",
        "may_grow",
        "prepacked",
        "prepackings",
        "spec",
    )

    def __init__(
        self, spec: TensorSpec, device_id: str, lease: Lease, offset_bytes: int = 0
    ) -> None:
        self.spec = spec
        self.device_id = device_id
        self.may_grow: Callable[[int], bool] = refuse_growth
        self.prepacked: PrepackedForms | None = PrepackedForms()
        self.prepackings: dict[Hashable, Prepacking | None] = {}
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
        view = CudaTensor(spec, self.device_id, self._lease, offset_bytes)
        view.prepacked = None
        return view

    def free(self) -> None:
        """Free the memory of the tensor and of its forms. It must be called once."""
        self._lease.free()
        if self.prepacked is not None:
            self.prepacked.free()


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
