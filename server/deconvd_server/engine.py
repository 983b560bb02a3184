"""The engine owns a device: it decides which calls run on it, and when."""

from __future__ import annotations

from deconvd.gradients import Gradients, Wanted
from deconvd.options import Options
from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.admission import Admission
from deconvd_server.call import Call
from deconvd_server.device import Device, DeviceInfo

__all__ = ["Engine"]


class Engine:
    """Runs calls on a device it owns, no more at once than the device can use.

    Args:
        waiting_count: How many calls may wait for their turn; the next is refused.
    """

    def __init__(self, device: Device, *, waiting_count: int) -> None:
        self._device = device
        self.info: DeviceInfo = device.info
        self._admission = Admission(self.info.calls_count, self.info.budget_bytes, waiting_count)

    def deconvolve(
        self, problem: Problem, x: Array, W: Array, b: Array | None, options: Options, call: Call
    ) -> Array:
        """Return y. Raises as `Admission.admitted` and `Device.deconvolve` do."""
        with self._admission.admitted(self._device.footprint_bytes(problem, None), call):
            return self._device.deconvolve(problem, x, W, b, options, call)

    def gradients(
        self,
        problem: Problem,
        x: Array | None,
        W: Array | None,
        gy: Array,
        wanted: Wanted,
        options: Options,
        call: Call,
    ) -> Gradients:
        """Return the wanted gradients. Raises as `Admission.admitted` and `Device.gradients` do."""
        with self._admission.admitted(self._device.footprint_bytes(problem, wanted), call):
            return self._device.gradients(problem, x, W, gy, wanted, options, call)

    def close(self) -> None:
        """Close the device. No call may be running, and none may follow."""
        self._device.close()
