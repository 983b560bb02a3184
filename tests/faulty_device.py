"""A device with a fault that nobody has foreseen, and how a server gets it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

from deconvd_server.device import Device
from deconvd_server.device.cpu import CpuDevice

__all__ = ["FAULTY_SAMPLES_COUNT", "PRELUDE", "install"]

FAULTY_SAMPLES_COUNT = 5
"""The device fails in calls with that many samples."""

PRELUDE = "import tests.faulty_device; tests.faulty_device.install()"
"""For a server's process: has it open this device."""


class FaultyDevice(CpuDevice):
    """A processor that fails in calls of `FAULTY_SAMPLES_COUNT` samples. It computes all others."""

    def run(self, *args: Any) -> None:
        (_, problem, *_rest) = args
        if problem.x.shape[0] == FAULTY_SAMPLES_COUNT:
            raise ZeroDivisionError
        super().run(*args)


def _open_devices(_name: str, _settings: object) -> Sequence[Device]:
    return [FaultyDevice(1)]


def install() -> None:
    """Have the server of this process open a `FaultyDevice`, whatever its options say."""
    mock.patch("deconvd_server.__main__.open_devices", _open_devices).start()
