"""Where the milliseconds of a shape's first call go: ``python -m benchmarks.call_parts --device cuda``.

Calls are made of the device itself, in this process, for the shapes of `benchmarks.new_shapes`. Functions of the device
are wrapped, and each is told what it took without those that it called. Prints, for each kind of call, the median
milliseconds of each part in the first, second and third call of a shape, and what no part had.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
import numpy as np

from benchmarks.new_shapes import draw_shapes, make_operands
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, spec_of
from deconvd_server.call.context import CallContext

_DEVICE: Final = "deconvd_server.device.cuda"

_PARTS: Final = {
    "describe to cuDNN": ("cudnn.search:EngineSearch.__init__",),
    "ask heuristics": ("cudnn.search:EngineSearch._configs",),
    "read proposals": ("cudnn.search:EngineSearch._proposal",),
    "build plan": ("cudnn.search:EngineSearch._serialize_plan",),
    "revive plan": ("cudnn.plan:_deserialize",),
    "list own kernels": ("kernels:candidates", "kernels:fallback"),
    "compile or load kernel": ("kernels.launch:_LoadedKernels._load",),
    "cuBLAS": ("kernels.blas:_Handles.get", "kernels.blas:Gemm.enqueue"),
    "allocate": ("api.memory_pool:CardMemoryPool.allocate",),
    "make noise": ("plans.plan_timer:_fill",),
    "run plan to time it": (
        "plans.plan_timer:PlanTimer.time_ms",
        "plans.plan_timer:PlanTimer.compare_ms",
        "plans.plan_timer:PlanTimer.can_run",
    ),
    "predict": ("plans.cost_model:CostModel.predict_ms",),
    "choose": ("plans.plan_cache:PlanCache._build_resource",),
    "wait for a chosen plan": ("plans.plan_cache:PlanCache.get",),
    "execute cuDNN plan": ("cudnn.plan:CudnnPlan.execute",),
    "execute own plan": ("kernels.steps:StepPlan.execute",),
    "capture graph": ("api.runtime:Stream.capture",),
    "instantiate graph": ("api.runtime:Graph.__init__",),
    "read graph's copies": ("execution.bound_graph:BoundGraph.__init__",),
    "launch graph": ("api.runtime:Graph.launch",),
    "wait for stream": ("api.runtime:Stream.wait",),
}
"""What is wrapped, by the names of the parts: modules below the device's, and names in them."""

_CALLS_COUNT: Final = 3


class PartTimes:
    """Adds up what wrapped functions take, each without those that it calls in its thread. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._local = threading.local()
        self._ms = Counter[str]()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose time counts under a name."""

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            stack = self._local.__dict__.setdefault("stack", [])
            stack.append(0.0)
            begin_s = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                took_ms = (time.perf_counter() - begin_s) * 1e3
                inner_ms = stack.pop()
                if stack:
                    stack[-1] += took_ms
                with self._lock:
                    self._ms[name] += took_ms - inner_ms

        return timed

    def take(self) -> Mapping[str, float]:
        """Return the milliseconds since the last time that this was called."""
        with self._lock:
            taken, self._ms = self._ms, Counter[str]()
        return taken


@click.command(help=__doc__)
@click.option("--device", default="cuda", show_default=True, help="cuda or cuda:N.")
@click.option("--shapes", "count", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--type", "dtypes", multiple=True, default=("float32", "float16"))
@click.option("--op", "ops", type=click.Choice(["y", "grad"]), multiple=True, default=("y", "grad"))
@click.option("--plan-store", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    device: str,
    count: int,
    dtypes: Sequence[str],
    ops: Sequence[str],
    plan_store: Path | None,
    json_file: Path | None,
) -> None:
    """Print the parts."""
    parts = _wrap_parts()
    from deconvd_server.device.cuda import open_device

    begin_s = time.perf_counter()
    card = open_device(int(device.partition(":")[2] or 0), plan_store=plan_store)
    card.wait_until_warm()
    print(f"open the device: {time.perf_counter() - begin_s:.3f} s")
    print("    " + _text(parts.take()), flush=True)
    report = {}
    for dtype in dtypes:
        for op in ops:
            times = [_times_of_shape(card, parts, size, dtype, op) for size in draw_shapes(count)]
            print(f"{dtype} {op}: the very first call\n    {_text(times[0][0])}")
            medians = {
                f"call {number + 1}": _medians([calls[number] for calls in times])
                for number in range(_CALLS_COUNT)
            }
            for name, part_ms in medians.items():
                print(f"{dtype} {op}: {name}\n    {_text(part_ms)}", flush=True)
            report[f"{dtype} {op}"] = medians
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1))
    card.close()


def _wrap_parts() -> PartTimes:
    """Wrap the functions, before others import them by name."""
    parts = PartTimes()
    for part, places in _PARTS.items():
        for place in places:
            module_name, _, path = place.partition(":")
            owner: Any = import_module(f"{_DEVICE}.{module_name}")
            *outer, name = path.split(".")
            for step in outer:
                owner = getattr(owner, step)
            setattr(owner, name, parts.wrap(part, getattr(owner, name)))
    return parts


def _times_of_shape(
    card: Any, parts: PartTimes, size: tuple[int, int], dtype: str, op: str
) -> list[dict[str, float]]:
    """Return the milliseconds of each part of each call of a shape."""
    x, W, gy = make_operands(size, dtype)
    problem = Problem(spec_of(x), spec_of(W), Geometry.from_arguments(2, 1))
    operands = {"x": x, "w": W} if op == "y" else {"x": x, "w": W, "gy": gy}
    results = {"y": problem.y} if op == "y" else {"gx": problem.x, "gw": problem.W}
    registered = {
        name: card.allocate_host_array(spec_of(array)) for name, array in operands.items()
    }
    for name, array in operands.items():
        registered[name][...] = array
    places = {name: _place(card, spec) for name, spec in results.items()}
    operation = DECONVOLVE if op == "y" else DECONVOLVE_GRAD
    times = []
    for _ in range(_CALLS_COUNT):
        parts.take()
        begin_s = time.perf_counter()
        card.run(operation, problem, registered, places, Options(), CallContext())
        total_ms = (time.perf_counter() - begin_s) * 1e3
        of_parts = dict(parts.take())
        # the call waits in one thread while others choose: that wait is theirs
        of_parts.pop("wait for a chosen plan", None)
        rest_ms = total_ms - sum(of_parts.values())
        times.append({"total": total_ms, **of_parts, "rest": rest_ms})
    return times


def _place(card: Any, spec: TensorSpec) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = card.allocate_host_array(spec)
    return array


def _medians(times: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    names = dict.fromkeys(name for one in times for name in one)
    return {name: statistics.median(one.get(name, 0.0) for one in times) for name in names}


def _text(part_ms: Mapping[str, float]) -> str:
    ordered = sorted(part_ms.items(), key=lambda item: -item[1])
    return "  ".join(f"{name} {ms:.2f}" for name, ms in ordered if ms >= 0.01)


if __name__ == "__main__":
    main()
