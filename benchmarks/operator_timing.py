"""Times our operator, and PyTorch's, on arrays that lie on a card. See `benchmarks.operator`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator
from importlib import metadata
from typing import TypeVar

import cupy
import torch

from benchmarks.cuda_operator import Operator
from benchmarks.layers import Layer
from benchmarks.operator_rows import OperatorRow, Precision
from benchmarks.reference import torch_type
from deconvd.model.options import Options
from deconvd.model.problem import Problem
from deconvd_server.device.cuda.device import CudaDevice, CudaLimits
from deconvd_server.device.cuda.plan import Product

__all__ = ["time_operators", "versions"]

BYTES_PER_S = 4.25e12
"""What a copy on one H200 reads and writes, as measured."""

ROTATED_BYTES = 256 << 20
"""Several times the L2 cache."""

MAX_SETS = 8
WARM_UPS = 3
REPEATS = 15
REPEAT_MS = 1.0


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


class OurOperator:
    """Our operator on some sets of tensors."""

    def __init__(self, operator: Operator, problem: Problem, options: Options) -> None:
        self._operator, self._problem, self._options = operator, problem, options

    def y(self, tensors: Tensors) -> None:
        """Compute y."""
        at = tensors.arrays
        self._operator.run(Product.Y, self._problem, at["x"], at["W"], at["y"], self._options)

    def gradients(self, tensors: Tensors) -> None:
        """Compute gx, gW and gb."""
        x, W, gy, gx, gW, gb = (tensors.arrays[name] for name in ("x", "W", "gy", "gx", "gW", "gb"))
        self._operator.run_gradients(self._problem, x, W, gy, gx, gW, gb, self._options)

    def plans(self, op: str) -> list[str]:
        """Return the names of the plans that serve an operation."""
        operations = [Product.Y] if op == "y" else [Product.GX, Product.GW]
        return [self._operator.plan_name(o, self._problem, self._options) for o in operations]


class TorchOperator:
    """PyTorch on the same tensors, in one memory format. It allocates its results, as its users' calls do."""

    def __init__(self, problem: Problem, memory_format: torch.memory_format) -> None:
        self._geometry, self._problem, self._format = problem.geometry, problem, memory_format

    def to_memory_format(self, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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


def time_operators(
    ordinal: int, layers: Collection[Layer], kinds: Collection[Precision], *, tuning_s: float
) -> Iterator[OperatorRow]:
    """Time layers on a card and yield their rows, y's and then the gradients'.

    Args:
        ordinal: The card's number.
        tuning_s: How long our plans are tuned, at most, each.
    """
    torch.cuda.set_device(ordinal)
    torch.backends.cudnn.benchmark = True
    device = CudaDevice(ordinal, limits=CudaLimits(tuning_s=tuning_s))
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream), torch.no_grad():
            for kind in kinds:
                for layer in layers:
                    operator = Operator(device, stream.cuda_stream)
                    yield from _rows_of(operator, layer, kind)
                    operator.close()
    finally:
        device.close()


def versions() -> dict[str, object]:
    """Return the versions of what is measured and of what it is measured with."""
    runtime = cupy.cuda.runtime
    return {
        "driver": runtime.driverGetVersion(),
        "cuda": runtime.runtimeGetVersion(),
        "cudnn": torch.backends.cudnn.version(),
        "cupy": cupy.__version__,
        **{name: metadata.version(name) for name in ("torch", "numpy")},
    }


def _rows_of(operator: Operator, layer: Layer, kind: Precision) -> Iterator[OperatorRow]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = kind.allow_tf32
    problem = layer.problem(kind.dtype)
    ours = OurOperator(operator, problem, Options(autotune=True, allow_tf32=kind.allow_tf32))
    peers = {
        "torch_nchw": TorchOperator(problem, torch.contiguous_format),
        "torch_nhwc": TorchOperator(problem, torch.channels_last),
    }
    sets_count = min(max(ROTATED_BYTES // layer.nbytes(kind.dtype), 1), MAX_SETS)
    sets = [Tensors(problem) for _ in range(sets_count)]
    prepared = {
        name: [peer.to_memory_format(tensors) for tensors in sets] for name, peer in peers.items()
    }
    for op in ("y", "grad"):
        error = _error(ours, peers["torch_nchw"], sets[0], prepared["torch_nchw"][0], op)
        if not error < kind.tolerance:
            print(f"WRONG: {layer.name} {kind.name} {op} differs from PyTorch by {error:.1e}")
        method = "y" if op == "y" else "gradients"
        yield OperatorRow(
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
    ours: OurOperator,
    peer: TorchOperator,
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
    calls_count = max(int(REPEAT_MS / max(_time_ms(call, sets, len(sets)), 1e-3)), 1)
    calls_count = -(-calls_count // len(sets)) * len(sets)
    return statistics.median(_time_ms(call, sets, calls_count) for _ in range(REPEATS))


def _time_ms(call: Callable[[_Operands], object], sets: list[_Operands], calls_count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for number in range(calls_count):
        call(sets[number % len(sets)])
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / calls_count


def _floor_ms(layer: Layer, kind: Precision, op: str) -> float:
    """Return what memory or arithmetic allows: each tensor moved once, and no product left out."""
    problem = layer.problem(kind.dtype)
    nbytes, products = layer.nbytes(kind.dtype), 1
    if op == "grad":
        nbytes += problem.x.nbytes + problem.W.nbytes + problem.b.nbytes
        products = 2
    return 1e3 * max(nbytes / BYTES_PER_S, products * layer.flops / kind.flops_per_s)
