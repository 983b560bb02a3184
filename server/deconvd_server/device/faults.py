"""Errors of a device: it cannot be used, or is lost."""

from __future__ import annotations

from deconvd.errors import UnavailableError

__all__ = ["DeviceHungError", "DeviceLostError", "DeviceUnavailableError"]


class DeviceUnavailableError(RuntimeError):
    """The device cannot be used. The message says, in one line, what to install or change."""


class DeviceHungError(UnavailableError):
    """A kernel or copy of the device does not end. Only a new process recovers from that. Try again."""


class DeviceLostError(UnavailableError):
    """The device failed in a way that only a new process recovers from. Try again."""
