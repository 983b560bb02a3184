"""Devices, which compute: one protocol, and a package for each kind of device. Nothing here knows a transport."""

from deconvd_server.device.arriving import Operand
from deconvd_server.device.departing import Departing, Place
from deconvd_server.device.protocol import TURN_S, CacheState, Device, DeviceInfo, TimeSharedDevice
from deconvd_server.device.tensor import DeviceTensor, LentMemory, Tensor

__all__ = [
    "TURN_S",
    "CacheState",
    "Departing",
    "Device",
    "DeviceInfo",
    "DeviceTensor",
    "LentMemory",
    "Operand",
    "Place",
    "Tensor",
    "TimeSharedDevice",
]
