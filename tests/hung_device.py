"""A device that hangs in native code, as a card does whose kernel never ends, and how a server gets it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from deconvd_server.device import Device
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.device.native_waits import NativeWaits

__all__ = ["HUNG_SAMPLES_COUNT", "PRELUDE", "HangingDevice", "hang_at_once", "install"]

HUNG_SAMPLES_COUNT = 3
"""The device hangs in calls with that many samples."""

PRELUDE = "import tests.hung_device; tests.hung_device.install()"
"""For `server_process`: has the server open this device."""

_wait_for_a_signal: Callable[[], int] = ctypes.CDLL(None).pause


class HangingDevice(CpuDevice):
    """A processor that does not return from calls of `HUNG_SAMPLES_COUNT` samples. It computes all others."""

    def __init__(self) -> None:
        super().__init__(1)
        self._waits = NativeWaits()

    @property
    def waiting_since_s(self) -> float:
        return self._waits.since_s

    def run(self, *args: Any) -> None:
        (_, problem, *_rest) = args
        if problem.x.shape[0] == HUNG_SAMPLES_COUNT:
            while True:  # the threads of a server may get signals
                self._waits.run(_wait_for_a_signal)
        super().run(*args)


def _open_devices(_name: str, _settings: object) -> Sequence[Device]:
    return [HangingDevice()]


def install() -> None:
    """Have the server of this process open a `HangingDevice`, whatever its options say."""
    mock.patch("deconvd_server.__main__.open_devices", _open_devices).start()


def hang_at_once() -> None:
    """Have every `HangingDevice` of this process hang without a call."""
    since_s = mock.PropertyMock(return_value=0.0)
    mock.patch.object(HangingDevice, "waiting_since_s", since_s).start()
