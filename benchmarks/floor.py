"""The floor of a whole call on a card: the upload of its operands from pinned memory, the kernels, the download."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec

__all__ = ["card_name", "floor_ms"]

_REPEATS = 20

_Pair: TypeAlias = tuple[Any, Any]
"""An array on the card, and one in pinned memory."""


def card_name(device: str) -> str | None:
    """Return the maker's name of a card; None if the device is none."""
    if not device.startswith("cuda"):
        return None
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(_ordinal(device))
    name: str = properties["name"].decode()
    return name


def floor_ms(device: str, problem: Problem, *, is_of_gradients: bool = False) -> float | None:
    """Return the sum of the stages' median times, each alone on the card; None without one.

    Args:
        is_of_gradients: Whether it is of a call for gx and gW rather than for y.
    """
    if not device.startswith("cuda"):
        return None
    import cupy
    import cupyx

    from benchmarks.cuda_operator import Operator
    from deconvd_server.device.cuda.device import CudaDevice
    from deconvd_server.device.cuda.plan import Product

    card = CudaDevice(_ordinal(device))
    with cupy.cuda.Device(_ordinal(device)), cupy.cuda.Stream() as stream:
        operator = Operator(card, stream.ptr)

        def pair(spec: TensorSpec) -> _Pair:
            return cupy.zeros(spec.nbytes, "u1"), cupyx.empty_pinned(spec.nbytes, "u1")

        x, W, y, gx, gW = map(pair, (problem.x, problem.W, problem.y, problem.x, problem.W))
        operands, results = [x, W], [y]
        works = [(Product.Y, x, W, y)]
        if is_of_gradients:  # y stands for gy
            operands, results = [x, W, y], [gx, gW]
            works = [(Product.GX, y, W, gx), (Product.GW, x, y, gW)]

        def upload() -> None:
            for array, host in operands:
                array.set(host, stream=stream)

        def compute(operation: Product, a: _Pair, b: _Pair, out: _Pair) -> None:
            options = Options(autotune=True)
            operator.run(operation, problem, a[0], b[0], out[0], options)

        def download() -> None:
            for array, host in results:
                array.get(out=host, stream=stream, blocking=False)

        stages: list[Callable[[], None]] = [upload]
        stages += [partial(compute, *work) for work in works]
        stages += [download]
        total_ms = sum(_median_ms(stage, stream) for stage in stages)
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
