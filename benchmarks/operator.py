"""How fast deconvolutions are on a card: ``python -m benchmarks.operator --device cuda --json FILE``.

Times y, and gx, gW and gb together, on arrays that lie on the card, NCHW in and out, with autotune; beside PyTorch's
conv_transpose2d and its backward with cudnn.benchmark, once with NCHW tensors, as its users have them, and once with
channels-last ones. The floor is what the card's memory or arithmetic allows. Every result is compared with PyTorch's
before it is timed. Times are CUDA events around back-to-back calls, so that they count what launching them costs where
that is more than computing them: medians, and operands that change from call to call where they fit the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TypeVar

import cupy
import numpy as np
import torch

from benchmarks.layers import LAYERS, Layer
from benchmarks.reference import torch_type
from deconvd.dtypes import BFLOAT16, DType
from deconvd.options import Options
from deconvd.problem import Problem
from deconvd_server.device.cuda.device import CudaDevice, Limits
from deconvd_server.device.cuda.operator import Operator
from deconvd_server.device.cuda.plan import Operation

BYTES_PER_S = 4.25e12
"""What a copy on one H200 reads and writes, as measured."""

ROTATED_BYTES = 256 << 20
"""Several times the L2 cache."""

MAX_SETS = 8
WARM_UPS = 3
REPEATS = 15
REPEAT_MS = 1.0


@dataclass(frozen=True)
class Kind:
    """An element type and how its products are taken.

    Attributes:
        flops_per_s: What matrix products reach on one H200, as measured.
        tolerance: The relative error of norms that two right results may differ by.
    """

    name: str
    dtype: DType
    flops_per_s: float
    tolerance: float
    allow_tf32: bool = False


KINDS = (
    Kind("float16", np.dtype(np.float16), 790e12, 2e-3),
    Kind("bfloat16", BFLOAT16, 790e12, 1.6e-2),
    Kind("float32", np.dtype(np.float32), 50e12, 1e-5),
    Kind("tf32", np.dtype(np.float32), 375e12, 2e-3, allow_tf32=True),
)


@dataclass(frozen=True)
class Row:
    """A line of the table; its fields are those of the JSON file."""

    layer: str
    dtype: str
    op: str
    ours_ms: float
    peers: dict[str, float]
    floor_ms: float
    plans: list[str]
    error: float

    def __str__(self) -> str:
        nchw, nhwc = self.peers["torch_nchw"], self.peers["torch_nhwc"]
        return (
            f"{self.layer:30} {self.dtype:8} {self.op:4} {self.ours_ms:8.4f} {nchw:8.4f} {nhwc:8.4f} "
            f"{self.floor_ms:8.4f} {self.ours_ms / nchw:6.2f} {self.ours_ms / min(nchw, nhwc):6.2f} "
            f"{self.ours_ms / self.floor_ms:6.1f}  {', '.join(self.plans)}"
        )


HEADER = (
    f"{'layer':30} {'type':8} {'op':4} {'ours':>8} {'NCHW':>8} {'NHWC':>8} {'floor':>8} "
    f"{'/NCHW':>6} {'/best':>6} {'/floor':>6}  plans"
)


_Operands = TypeVar("_Operands")


class Tensors:
    """A problem's tensors on the card, with places for results: NCHW, also as cupy arrays."""

    def __init__(self, problem: Problem) -> None:
        shapes = {"x": problem.x.shape, "W": problem.W.shape, "gy": problem.y.shape}
        dtype = torch_type(problem.x.dtype)
        drawn = {name: torch.randn(s, device="cuda").to(dtype) for name, s in shapes.items()}
        self.x, self.W, self.gy = drawn["x"], drawn["W"], drawn["gy"]
        self.y, self.gx, self.gW = (
            torch.full_like(t, float("nan")) for t in (self.gy, self.x, self.W)
        )
        self.gb = torch.full((problem.c_O,), float("nan"), device="cuda", dtype=dtype)
        names = ("x", "W", "gy", "y", "gx", "gW", "gb")
        self.arrays = {name: _as_cupy(getattr(self, name)) for name in names}


def _as_cupy(tensor: torch.Tensor) -> cupy.ndarray:
    two_bytes = tensor.dtype == torch.bfloat16  # which cupy does not know
    return cupy.asarray(tensor.view(torch.int16) if two_bytes else tensor)


class Ours:
    """Our operator on some sets of tensors."""

    def __init__(self, operator: Operator, problem: Problem, options: Options) -> None:
        self._operator, self._problem, self._options = operator, problem, options

    def y(self, tensors: Tensors) -> None:
        """Compute y."""
        at = tensors.arrays
        self._operator.run(Operation.Y, self._problem, at["x"], at["W"], at["y"], self._options)

    def gradients(self, tensors: Tensors) -> None:
        """Compute gx, gW and gb."""
        operands = (tensors.arrays[name] for name in ("x", "W", "gy", "gx", "gW", "gb"))
        self._operator.run_gradients(self._problem, *operands, self._options)

    def plans(self, op: str) -> list[str]:
        """Return the names of the plans that serve an operation."""
        operations = [Operation.Y] if op == "y" else [Operation.GX, Operation.GW]
        return [self._operator.plan_name(o, self._problem, self._options) for o in operations]


class Peer:
    """PyTorch on the same tensors, in one memory format. It allocates its results, as its users' calls do."""

    def __init__(self, problem: Problem, memory_format: torch.memory_format) -> None:
        self._geometry, self._problem, self._format = problem.geometry, problem, memory_format

    def prepared(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x, W and gy in the memory format."""
        x, W, gy = (
            t.contiguous(memory_format=self._format) for t in (tensors.x, tensors.W, tensors.gy)
        )
        return x, W, gy

    def y(self, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return y."""
        x, W, _ = operands
        g = self._geometry
        return torch.nn.functional.conv_transpose2d(
            x, W, None, g.stride, g.pad, 0, g.groups, g.dilate
        )

    def gradients(
        self, operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return gx, gW and gb: what autograd calls, without autograd's own cost."""
        x, W, gy = operands
        g = self._geometry
        gx, gW, gb = torch.ops.aten.convolution_backward(
            gy,
            x,
            W,
            [self._problem.c_O],
            g.stride,
            g.pad,
            g.dilate,
            True,
            (0, 0),
            g.groups,
            (True,) * 3,
        )
        return gx, gW, gb


def main() -> None:
    """Time what the arguments ask for."""
    arguments = _arguments()
    if not arguments.device.startswith("cuda"):
        sys.exit("operators are timed on cards: give --device cuda")
    ordinal = int(arguments.device.partition(":")[2] or 0)
    torch.cuda.set_device(ordinal)
    torch.backends.cudnn.benchmark = True
    device = CudaDevice(ordinal, limits=Limits(tuning_s=arguments.tuning_s))
    rows = []
    try:
        print(HEADER, flush=True)
        for row in _rows(device, arguments):
            rows.append(row)
            print(row, flush=True)
    finally:
        device.close()
    _print_means(rows)
    if arguments.json:
        arguments.json.write_text(
            json.dumps(_about(ordinal) | {"rows": [asdict(r) for r in rows]}, indent=1)
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--layers", default="", help="only layers whose names hold this text")
    parser.add_argument("--types", default="float16,bfloat16,float32,tf32")
    parser.add_argument("--tuning-s", type=float, default=5.0, help="at most, for each plan")
    return parser.parse_args()


def _rows(device: CudaDevice, arguments: argparse.Namespace) -> Iterator[Row]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        for kind in KINDS:
            for layer in LAYERS:
                if kind.name in arguments.types.split(",") and arguments.layers in layer.name:
                    operator = Operator(device, stream.cuda_stream)
                    yield from _rows_of(operator, layer, kind)
                    operator.close()


def _rows_of(operator: Operator, layer: Layer, kind: Kind) -> Iterator[Row]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind.allow_tf32
    problem = layer.problem(kind.dtype)
    ours = Ours(operator, problem, Options(autotune=True, allow_tf32=kind.allow_tf32))
    peers = {
        "torch_nchw": Peer(problem, torch.contiguous_format),
        "torch_nhwc": Peer(problem, torch.channels_last),
    }
    sets_count = min(max(ROTATED_BYTES // layer.nbytes(kind.dtype), 1), MAX_SETS)
    sets = [Tensors(problem) for _ in range(sets_count)]
    prepared = {name: [peer.prepared(tensors) for tensors in sets] for name, peer in peers.items()}
    for op in ("y", "grad"):
        error = _error(ours, peers["torch_nchw"], sets[0], prepared["torch_nchw"][0], op)
        if not error < kind.tolerance:
            print(f"WRONG: {layer.name} {kind.name} {op} differs from PyTorch by {error:.1e}")
        method = "y" if op == "y" else "gradients"
        yield Row(
            layer.name,
            kind.name,
            op,
            _median_ms(getattr(ours, method), sets),
            {
                name: _median_ms(getattr(peer, method), prepared[name])
                for name, peer in peers.items()
            },
            _floor_ms(layer, kind, op),
            ours.plans(op),
            error,
        )


def _error(
    ours: Ours,
    peer: Peer,
    tensors: Tensors,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    op: str,
) -> float:
    """Return how far ours is from PyTorch's, relative to the norm: the largest of all results."""
    if op == "y":
        ours.y(tensors)
        pairs = [(tensors.y, peer.y(operands))]
    else:
        ours.gradients(tensors)
        results = tensors.gx, tensors.gW, tensors.gb
        pairs = list(zip(results, peer.gradients(operands), strict=True))
    errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def _median_ms(call: Callable[[_Operands], object], sets: list[_Operands]) -> float:
    """Return the median time of a call, in milliseconds, over back-to-back calls on sets in turn."""
    for _ in range(WARM_UPS):
        for operands in sets:
            call(operands)
    calls_count = max(int(REPEAT_MS / max(_timed_ms(call, sets, len(sets)), 1e-3)), 1)
    calls_count = -(-calls_count // len(sets)) * len(sets)
    return statistics.median(_timed_ms(call, sets, calls_count) for _ in range(REPEATS))


def _timed_ms(
    call: Callable[[_Operands], object], sets: list[_Operands], calls_count: int
) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for number in range(calls_count):
        call(sets[number % len(sets)])
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls_count


def _floor_ms(layer: Layer, kind: Kind, op: str) -> float:
    """Return what memory or arithmetic allows: each tensor moved once, and no product left out."""
    problem = layer.problem(kind.dtype)
    nbytes, products = layer.nbytes(kind.dtype), 1
    if op == "grad":
        nbytes += problem.x.nbytes + problem.W.nbytes + problem.b.nbytes
        products = 2
    return 1e3 * max(nbytes / BYTES_PER_S, products * layer.flops / kind.flops_per_s)


def _print_means(rows: list[Row]) -> None:
    """Print geometric means of ratios, for each type and operation."""
    for kind in KINDS:
        for op in ("y", "grad"):
            some = [row for row in rows if (row.dtype, row.op) == (kind.name, op)]
            if some:
                nchw = _geometric_mean([row.ours_ms / row.peers["torch_nchw"] for row in some])
                best = _geometric_mean([row.ours_ms / min(row.peers.values()) for row in some])
                floor = _geometric_mean([row.ours_ms / row.floor_ms for row in some])
                slower = sum(row.ours_ms > 1.05 * row.peers["torch_nchw"] for row in some)
                print(
                    f"{kind.name:8} {op:4} geometric mean of ours: {nchw:.2f} of PyTorch's NCHW, "
                    f"{best:.2f} of its best, {floor:.1f} floors; {slower} of {len(some)} rows slower"
                )


def _geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def _about(ordinal: int) -> dict[str, object]:
    """Return what was measured, with what, and when."""
    runtime = cupy.cuda.runtime
    return {
        "card": torch.cuda.get_device_name(ordinal),
        "versions": {
            "driver": runtime.driverGetVersion(),
            "cuda": runtime.runtimeGetVersion(),
            "cudnn": torch.backends.cudnn.version(),
            **{name: metadata.version(name) for name in ("torch", "numpy")},
            "cupy": cupy.__version__,
        },
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
