"""Checks every plan of ours against float64 and times it: ``python -m benchmarks.kernels``.

Prints a line for each plan of each layer, then what failed over a grid of random problems. Needs PyTorch for the
reference.
"""

from __future__ import annotations

import argparse
import random
import sys
import traceback
from collections.abc import Iterator

import numpy as np
import torch

from benchmarks.layers import LAYERS
from benchmarks.reference import (
    ReferenceOperands,
    draw,
    reference_result,
    relative_error,
    tolerance,
)
from deconvd.errors import InvalidArgumentError
from deconvd.model.dtypes import BFLOAT16, ELEMENT_TYPES
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec
from deconvd_server.device.cuda.kernels import candidates, fallback
from deconvd_server.device.cuda.plan import Plan, Product

BYTES_PER_S = 4.25e12
FLOPS_PER_S = {"float16": 790e12, BFLOAT16.name: 790e12, "float32": 50e12, "float64": 60e12}


def main() -> None:
    """Check and time."""
    arguments = _arguments()
    failures: list[str] = []
    for layer in LAYERS:
        if arguments.layers in layer.name:
            for name in arguments.dtypes.split(","):
                dtype = BFLOAT16 if name == "bfloat16" else np.dtype(name)
                floor_s = max(layer.nbytes(dtype) / BYTES_PER_S, layer.flops / FLOPS_PER_S[name])
                print(f"{layer.name}, {name}: floor {floor_s * 1e3:.3f} ms", flush=True)
                failures += _check_all(layer.problem(dtype), time=True)
    for number in range(arguments.grid):
        failures += _check_all(_random_problem(random.Random(number)), time=False)
    print(f"{len(failures)} failures")
    print("\n".join(failures[:60]))
    sys.exit(bool(failures))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="", help="only layers whose names hold this text")
    parser.add_argument("--dtypes", default="float16,float32")
    parser.add_argument("--grid", type=int, default=0, help="how many random problems to check")
    return parser.parse_args()


def _check_all(problem: Problem, *, time: bool) -> Iterator[str]:
    """Check, and perhaps time, each of our plans; yield a line for each that is wrong or fails."""
    options = Options()
    operands = draw(problem)
    for operation in Product:
        reference = reference_result(operands, operation)
        plans: list[Plan] = []
        if problem.has_products:
            plans += candidates(operation, problem, options)
        if not any(plan.name == "gemm columns" for plan in plans):
            plans.append(fallback(operation, problem, options))
        for plan in plans:
            try:
                yield from _check(plan, operation, operands, reference, time=time)
            except Exception:  # noqa: BLE001 - a check that fails is a row of the report
                traceback.print_exc()
                yield f"{operation} {plan.name} RAISED: {problem}"


def _check(
    plan: Plan,
    operation: Product,
    operands: ReferenceOperands,
    reference: torch.Tensor,
    *,
    time: bool,
) -> Iterator[str]:
    execution = _Execution(plan, operation, operands)
    first = execution.run()
    error = relative_error(first, reference)
    same = torch.equal(execution.run().view(torch.uint8), first.view(torch.uint8))
    wrong = not error < tolerance(operands.problem.x.dtype) or not same
    if time:
        label = "WRONG" if wrong else "ok"
        times = execution.median_ms()
        print(
            f"  {operation:2} {plan.name:40} {times:8.4f} ms  error {error:.1e} {label}", flush=True
        )
    if wrong:
        yield f"{operation} {plan.name} error {error:.1e} repeatable {same}: {operands.problem}"


class _Execution:
    """A plan with memory for its workspace and results."""

    def __init__(self, plan: Plan, operation: Product, operands: ReferenceOperands) -> None:
        self._plan, self._operation, self._operands = plan, operation, operands
        self._workspace = torch.full(
            (plan.workspace_bytes + 256,), 0xFF, dtype=torch.uint8, device="cuda"
        )

    def run(self) -> torch.Tensor:
        """Execute it once and return the result. Memory is poisoned with NaN before."""
        self._workspace.fill_(0xFF)
        out = self._operands.make_nan_output(self._operation)
        self._execute(out)
        torch.cuda.synchronize()
        return out

    def _execute(self, out: torch.Tensor) -> None:
        a, b = self._operands.of(self._operation)
        workspace = -(-self._workspace.data_ptr() // 256) * 256
        stream = torch.cuda.current_stream().cuda_stream
        self._plan.execute(a.data_ptr(), b.data_ptr(), out.data_ptr(), workspace, stream)

    def median_ms(self) -> float:
        """Return the median device time of a replayed graph that executes it several times."""
        out = self._operands.make_nan_output(self._operation)
        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        repeats = 5
        with torch.cuda.stream(stream):
            self._execute(out)
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(repeats):
                    self._execute(out)
            times = [_time_graph(graph) / repeats for _ in range(8)]
        return float(np.median(times[2:]))


def _time_graph(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _random_problem(rng: random.Random) -> Problem:
    """Return a small problem with everything odd: axes that differ, outsize both ways, groups, dilation."""
    while True:
        groups = rng.choice([1, 1, 1, 2, 3, 8])
        inputs, outputs = rng.choice([1, 1, 2, 3, 8, 16, 40]), rng.choice([1, 1, 2, 3, 8, 16, 40])
        kernel = rng.choice([1, 2, 3, 4, 5, 9]), rng.choice([1, 2, 3, 4, 5, 7])
        stride = rng.choice([1, 1, 2, 2, 3, 4]), rng.choice([1, 1, 2, 2, 3, 5])
        dilate = rng.choice([1, 1, 1, 2, 3]), rng.choice([1, 1, 1, 2, 4])
        if rng.random() < 0.6:  # most users' filters are square
            kernel, stride, dilate = (kernel[0],) * 2, (stride[0],) * 2, (dilate[0],) * 2
        pad = rng.randint(0, 3), rng.randint(0, 3)
        image = rng.choice([1, 3, 8, 16, 33]), rng.choice([1, 4, 7, 16, 32])
        dtype = rng.choice(ELEMENT_TYPES)
        x = TensorSpec((rng.choice([1, 2, 5]), inputs * groups, *image), dtype)
        W = TensorSpec((inputs * groups, outputs, *kernel), dtype)
        natural = Geometry(stride, pad, (None, None), dilate, groups).natural_size(image, kernel)
        outsize = tuple(
            rng.choice([None, None, max(size + rng.randint(1 - s, s - 1), 1)])
            for size, s in zip(natural, stride, strict=True)
        )
        try:
            return Problem(x, W, Geometry(stride, pad, (outsize[0], outsize[1]), dilate, groups))
        except InvalidArgumentError:
            continue


if __name__ == "__main__":
    main()
