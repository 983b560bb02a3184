"""The engines: each owns a device and decides which calls run on it, and when."""

from __future__ import annotations

from collections.abc import Sequence

from deconvd.gradients import Gradients, Wanted
from deconvd.options import Options
from deconvd.problem import Problem
from deconvd.tensor import Array
from deconvd_server.admission import Admission, Load
from deconvd_server.call import Call
from deconvd_server.device import CacheState, Device, DeviceInfo

__all__ = ["Engine", "Engines"]


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

    @property
    def load(self) -> Load:
        """What runs and what waits now."""
        return self._admission.load

    @property
    def caches(self) -> Sequence[CacheState]:
        """What its device keeps between calls, now."""
        return self._device.caches

    def close(self) -> None:
        """Close the device. No call may be running, and none may follow."""
        self._device.close()


class Engines:
    """The engines of a server, one for each of its devices: at least one.

    Args:
        waiting_count: How many calls may wait for their turn on each device.
    """

    def __init__(self, devices: Sequence[Device], *, waiting_count: int) -> None:
        self.all = tuple(Engine(device, waiting_count=waiting_count) for device in devices)

    def least_loaded(self) -> Engine:
        """Return the engine with the fewest calls, and of several the one with the most free memory."""
        return min(self.all, key=_burden)

    def close(self) -> None:
        """Close every device. No call may be running, and none may follow."""
        for engine in self.all:
            engine.close()


def _burden(engine: Engine) -> tuple[int, float]:
    load = engine.load
    return load.running_count + load.waiting_count, load.used_bytes / engine.info.budget_bytes
