"""A card's tensors: their memory, and copies between them and arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager

from deconvd.model.dtypes import Array
from deconvd.model.problem import TensorSpec
from deconvd_server.call.context import CallContext
from deconvd_server.device.cuda.api.memory import DeviceMemory
from deconvd_server.device.cuda.api.registered_pool import RegisteredPool
from deconvd_server.device.cuda.api.runtime import ipc_handle
from deconvd_server.device.cuda.cuda_tensor import CudaLentMemory, CudaTensor, as_cuda_tensor
from deconvd_server.device.cuda.execution.lane import Lane
from deconvd_server.device.tensor import DeviceTensor

__all__ = ["CardTensors"]


class CardTensors(ABC):
    """The methods of a card's device that allocate, free and copy tensors. See `Device`.

    Attributes:
        memory: The card's memory, from which tensors are allocated.
    """

    memory: DeviceMemory
    _id: str
    _host_arrays: RegisteredPool

    @abstractmethod
    def activate(self) -> AbstractContextManager[None]:
        """Make the card the calling thread's device, and translate errors, for the length of a with-block."""

    @abstractmethod
    def register(self, address: int, size_bytes: int) -> Callable[[], None]:
        """Let the card read and write host memory by itself. See `Device`."""

    @abstractmethod
    def _lend_lane(self, call: CallContext) -> AbstractContextManager[Lane]:
        """Lend a lane, with the card as the thread's device. See `LanePool.lend`."""

    def empty(self, spec: TensorSpec) -> CudaTensor:
        """Return a new tensor. See `Device`."""
        with self.activate():  # a block has at least a byte, so that each tensor has an address
            lease = self.memory.lease_resident(max(spec.nbytes, 1))
        return CudaTensor(spec, self._id, lease)

    def free(self, tensor: DeviceTensor) -> None:
        """Give the memory of a tensor back. See `Device`."""
        with self.activate():
            as_cuda_tensor(tensor, self._id).free()

    def write(self, tensor: DeviceTensor, array: Array, call: CallContext) -> None:
        """Copy an array into a tensor. See `Device`."""
        with self._lend_lane(call) as lane:
            lane.upload(array, as_cuda_tensor(tensor, self._id), call)

    def read(self, tensor: DeviceTensor, call: CallContext, out: Array | None = None) -> Array:
        """Return a tensor's elements. See `Device`."""
        array = self.allocate_host_array(tensor.spec) if out is None else out
        with self._lend_lane(call) as lane:
            lane.download(as_cuda_tensor(tensor, self._id), array, call)
        return array

    def allocate_host_array(self, spec: TensorSpec, *, is_lasting: bool = False) -> Array:
        """Return a new array: in registered memory, unless it is small. See `Device`."""
        return self._host_arrays.empty(spec, self.register, is_lasting=is_lasting)

    def lend(self, size_bytes: int) -> CudaLentMemory:
        """Return new memory that another process may open. See `Device`."""
        with self.activate():
            lease = self.memory.lease_shared(size_bytes)
            try:
                handle = ipc_handle(lease.pointer)
            except BaseException:
                lease.free()
                raise
        return CudaLentMemory(self._id, lease, size_bytes, handle)
