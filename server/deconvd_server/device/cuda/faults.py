"""Errors of the card: which end a call, and which end the process. Needs no CUDA."""

from deconvd_server.device.faults import DeviceLostError, DeviceUnavailableError

__all__ = ["DeviceLostError", "DeviceUnavailableError"]
