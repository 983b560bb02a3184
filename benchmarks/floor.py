"""The floor of a whole call on a card: the upload of x and W from pinned memory, the kernel, the download of y."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from deconvd.options import Options
from deconvd.problem import Problem

__all__ = ["card_name", "floor_ms"]

_REPEATS = 20


def card_name(device: str) -> str | None:
    """Return the maker's name of a card; None if the device is none."""
    if not device.startswith("cuda"):
        return None
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(_ordinal(device))
    name: str = properties["name"].decode()
    return name


def floor_ms(device: str, problem: Problem) -> float | None:
    """Return the sum of the three stages' median times, each alone on the card; None without one."""
    if not device.startswith("cuda"):
        return None
    import cupy
    import cupyx

    from deconvd_server.device.cuda.device import CudaDevice
    from deconvd_server.device.cuda.operator import Operator
    from deconvd_server.device.cuda.plan import Operation

    specs = (problem.x, problem.W, problem.y)
    card = CudaDevice(_ordinal(device))
    with cupy.cuda.Device(_ordinal(device)), cupy.cuda.Stream() as stream:
        hosts = [cupyx.empty_pinned(spec.nbytes, "u1") for spec in specs]
        x, W, y = (cupy.zeros(spec.nbytes, "u1") for spec in specs)
        operator = Operator(card, stream.ptr)

        def upload() -> None:
            for array, host in ((x, hosts[0]), (W, hosts[1])):
                array.set(host, stream=stream)

        def compute() -> None:
            operator.run(Operation.Y, problem, x, W, y, Options(autotune=True))

        def download() -> None:
            y.get(out=hosts[2], stream=stream, blocking=False)

        total_ms = sum(_median_ms(stage, stream) for stage in (upload, compute, download))
        operator.close()
    card.close()
    return total_ms


def _median_ms(work: Callable[[], None], stream: object) -> float:
    import cupy

    times: list[float] = []
    for _ in range(_REPEATS):
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(begin, end))
    return statistics.median(times[_REPEATS // 4 :])


def _ordinal(device: str) -> int:
    return int(device.partition(":")[2] or 0)
