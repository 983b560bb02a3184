"""What computes: one protocol, a package for each kind of device. Nothing here knows a transport."""

from deconvd_server.device.arriving import Operand
from deconvd_server.device.protocol import CacheState, Device, DeviceInfo
from deconvd_server.device.tensor import DeviceTensor, LentMemory, Tensor

__all__ = [
    "CacheState",
    "Device",
    "DeviceInfo",
    "DeviceTensor",
    "LentMemory",
    "Operand",
    "Tensor",
]
