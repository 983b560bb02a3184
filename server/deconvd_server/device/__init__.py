"""What computes: one protocol, a package for each kind of device. Nothing here knows of gRPC."""

from deconvd_server.device.protocol import (
    CacheState,
    Device,
    DeviceInfo,
    DeviceTensor,
    LentMemory,
    Operand,
    resident_bytes,
)

__all__ = [
    "CacheState",
    "Device",
    "DeviceInfo",
    "DeviceTensor",
    "LentMemory",
    "Operand",
    "resident_bytes",
]
