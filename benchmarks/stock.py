"""The service that one would write in an afternoon, to compare with: unary gRPC over TCP, with the generated classes.

On a card PyTorch computes; elsewhere, or without PyTorch, our own operator on the processor.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import click
import grpc
import numpy as np

from benchmarks.layers import Layer
from deconvd.model.dtypes import Array
from deconvd.model.operation import DECONVOLVE
from deconvd.model.options import Options
from deconvd.model.problem import Problem, TensorSpec, problem_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.messages import geometry_from_message, message_from_geometry
from deconvd.wire.tensor import message_from_array, spec_from_message

__all__ = ["StockCall", "stock_operator", "stock_service"]

StockCall = Callable[[Layer, Array, Array], Array]
"""Calls the service: from a layer, x and W to y."""

_THREADS_COUNT = 4
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

_Operator = Callable[[Problem, bytes, bytes], bytes]
"""From the elements of x and W to those of y."""


def stock_operator(device: str) -> str:
    """Return what the service computes with: ``torch``, or ``deconvd cpu``."""
    return "torch" if device.startswith("cuda") and find_spec("torch") else "deconvd cpu"


@contextmanager
def stock_service(device: str) -> Iterator[StockCall]:
    """Run the service for the block, in a process of its own, and give what calls it."""
    command = [sys.executable, "-m", "benchmarks.stock", device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            target = process.stdout.readline().strip()
            with grpc.insecure_channel(target, _UNLIMITED) as channel:
                stub = pb_grpc.DeconvolutionServiceStub(channel)
                yield lambda layer, x, W: _call(stub, layer, x, W)
        finally:
            process.kill()


def _call(stub: pb_grpc.DeconvolutionServiceStub, layer: Layer, x: Array, W: Array) -> Array:
    problem = layer.problem(x.dtype)
    request = pb.DeconvolveRequest(
        x=message_from_array(x),
        w=message_from_array(W),
        geometry=message_from_geometry(problem.geometry),
    )
    return np.frombuffer(stub.Deconvolve(request).y.raw, x.dtype).reshape(problem.y.shape)


class _Servicer(pb_grpc.DeconvolutionServiceServicer):
    def __init__(self, operator: _Operator) -> None:
        self._operator = operator

    def Deconvolve(self, request: pb.DeconvolveRequest, context: Any) -> pb.DeconvolveResponse:
        x, W = spec_from_message("x", request.x), spec_from_message("W", request.w)
        problem = problem_of(x, W, geometry_from_message(request.geometry))
        raw = self._operator(problem, request.x.raw, request.w.raw)
        y = pb.Tensor(element_type=request.x.element_type, shape=problem.y.shape, raw=raw)
        return pb.DeconvolveResponse(y=y)


def _torch_operator(device: str) -> _Operator:
    import warnings

    import torch
    from torch.nn.functional import conv_transpose2d

    from benchmarks.reference import torch_type

    warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # as in ours

    def on_card(raw: bytes, spec: TensorSpec) -> torch.Tensor:
        flat = torch.frombuffer(raw, dtype=torch_type(spec.dtype))
        return flat.reshape(spec.shape).to(device)

    def operator(problem: Problem, x: bytes, W: bytes) -> bytes:
        geometry = problem.geometry
        y = conv_transpose2d(
            on_card(x, problem.x),
            on_card(W, problem.W),
            stride=geometry.stride,
            padding=geometry.pad,
            dilation=geometry.dilate,
            groups=geometry.groups,
        )
        elements: bytes = y.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return elements

    return operator


def _cpu_operator() -> _Operator:
    from deconvd_server.call.context import CallContext
    from deconvd_server.device.cpu import CpuDevice

    cpu = CpuDevice()

    def operator(problem: Problem, x: bytes, W: bytes) -> bytes:
        x_array = np.frombuffer(x, problem.x.dtype).reshape(problem.x.shape)
        W_array = np.frombuffer(W, problem.W.dtype).reshape(problem.W.shape)
        y = np.empty(problem.y.shape, problem.y.dtype)
        operands = {"x": x_array, "w": W_array}
        cpu.run(DECONVOLVE, problem, operands, {"y": y}, Options(), CallContext())
        return y.tobytes()

    return operator


@click.command()
@click.argument("device")
def main(device: str) -> None:
    """Serve until killed; print where."""
    is_torch = stock_operator(device) == "torch"
    operator = _torch_operator(device) if is_torch else _cpu_operator()
    server = grpc.server(ThreadPoolExecutor(_THREADS_COUNT), options=_UNLIMITED)
    pb_grpc.add_DeconvolutionServiceServicer_to_server(
        _Servicer(operator),  # type: ignore[abstract]  # it has what is measured
        server,
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
