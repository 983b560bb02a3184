"""A card's tensors: their memory, and what is copied between them and arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from deconvd.host.buffer_pool import ArrayMemory
from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd_server.call.context import Call
from deconvd_server.device.cuda.api.memory import DeviceMemory
from deconvd_server.device.cuda.api.runtime import PinnedBuffer, ipc_handle
from deconvd_server.device.cuda.execution.lane import Lane
from deconvd_server.device.cuda.tensors.tensor import CudaLentMemory, CudaTensor, own
from deconvd_server.device.tensor import DeviceTensor

__all__ = ["CardTensors"]


class CardTensors(ABC):
    """What a card's device does with tensors beside computing. See `Device`.

    Attributes:
        memory: Where they lie.
    """

    memory: DeviceMemory
    _id: str
    _results: ArrayMemory

    @abstractmethod
    def using(self) -> AbstractContextManager[None]:
        """Let the calling thread use the card; errors are raised as this device raises them."""

    @abstractmethod
    def _working(self, call: Call) -> AbstractContextManager[Lane]:
        """Lend a lane, with the card as the thread's device. See `Lanes.lend`."""

    def empty(self, spec: TensorSpec) -> CudaTensor:
        """Return a new tensor. See `Device`."""
        with self.using():
            lease = self.memory.take_to_stay(max(spec.nbytes, 1))
        return CudaTensor(spec, self._id, lease)

    def free(self, tensor: DeviceTensor) -> None:
        """Give the memory of a tensor back. See `Device`."""
        with self.using():
            own(tensor, self._id).free()

    def write(self, tensor: DeviceTensor, array: Array, call: Call) -> None:
        """Copy an array into a tensor. See `Device`."""
        with self._working(call) as lane:
            lane.upload(array, own(tensor, self._id), call)

    def read(self, tensor: DeviceTensor, call: Call, out: Array | None = None) -> Array:
        """Return a tensor's elements. See `Device`."""
        array = self._results.empty(tensor.spec) if out is None else out
        with self._working(call) as lane:
            lane.download(own(tensor, self._id), array, call)
        return array

    def host_memory(self, spec: TensorSpec) -> Array:
        """Return a new array in pinned memory. See `Device`."""
        with self.using():
            pinned = PinnedBuffer(max(spec.nbytes, 1)).bytes
        return pinned[: spec.nbytes].view(spec.dtype).reshape(spec.shape)

    def lend(self, size_bytes: int) -> CudaLentMemory:
        """Return new memory that another process may open. See `Device`."""
        with self.using():
            lease = self.memory.take_to_lend(size_bytes)
            try:
                handle = ipc_handle(lease.pointer)
            except BaseException:
                lease.free()
                raise
        return CudaLentMemory(self._id, lease, size_bytes, handle)
