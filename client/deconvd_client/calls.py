"""Deconvolutions and gradients as calls of the service: small ones in one message, large ones in a stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Final

import numpy as np

from deconvd.chunks import ChunkReader, chunks_of, slices
from deconvd.codec import Buffer, Envelope
from deconvd.gradients import Gradients, Wanted
from deconvd.messages import message_from_geometry, message_from_options
from deconvd.options import Options
from deconvd.problem import Problem, TensorSpec
from deconvd.tensor import Array, array_from_message, elements_of, message_from_spec
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.shared_memory import Borrower, call_with_shared_memory
from deconvd_client.stub import Stub

__all__ = ["deconvolve", "gradients"]

_MAX_UNARY_BYTES: Final = (4 << 20) - (64 << 10)
"""Operands and results together: a stream is faster above it, and proxies have limits of 4 MiB."""

_SLICE_BYTES: Final = 8 << 20
"""Operands and results of a slice: enough to keep a GPU busy, little enough to flow."""

_REMEMBERED_COUNT: Final = 1024
"""Kinds of calls whose descriptions are kept: most calls are made again and again."""


def deconvolve(
    stub: Stub,
    memory: Borrower,
    problem: Problem,
    x: Array,
    W: Array,
    b: Array | None,
    options: Options,
) -> Array:
    """Return y. Raises a DeconvdError, as `Stub` does."""
    request = _request(problem, options, with_b=b is not None)
    operands = {"x": x, "w": W}
    if b is not None:
        operands["b"] = b
    shared = call_with_shared_memory(memory, stub.deconvolve, request, operands, {"y": problem.y})
    if shared is not None:
        return shared["y"]
    if _fits_a_message(problem.x, problem.W, problem.y):
        raw: dict[str, Buffer] = {field: elements_of(array) for field, array in operands.items()}
        response = stub.deconvolve(Envelope(request, raw))
        return _array("y", response.message.y, response.raw)
    return _deconvolve_streamed(stub, request, problem, x, [W] if b is None else [W, b])


def _deconvolve_streamed(
    stub: Stub, request: pb.DeconvolveRequest, problem: Problem, x: Array, constants: list[Array]
) -> Array:
    step = _slice_samples_count(problem, problem.x, problem.y)
    header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=step)

    def parts() -> Iterator[bytes]:
        yield pb.DeconvolveStreamRequest(header=header).SerializeToString()
        for constant in constants:
            yield from chunks_of(constant)
        yield from _sliced([x], step)

    def receive(reader: ChunkReader[pb.DeconvolveStreamResponse]) -> Array:
        reader.header()
        y = reader.read("y", problem.y)
        reader.expect_end()
        return y

    return stub.deconvolve_stream(parts, receive)


def gradients(
    stub: Stub,
    memory: Borrower,
    problem: Problem,
    x: Array,
    W: Array,
    gy: Array,
    wanted: Wanted,
    options: Options,
) -> Gradients:
    """Return the wanted gradients. Raises a DeconvdError, as `Stub` does."""
    request = _grad_request(problem, options, wanted)
    operands = {"gy": gy}
    results = {"gb": problem.b} if wanted.gb else {}
    if wanted.gW:
        operands["x"], results["gw"] = x, problem.W
    if wanted.gx:
        operands["w"], results["gx"] = W, problem.x
    shared = call_with_shared_memory(memory, stub.deconvolve_grad, request, operands, results)
    if shared is not None:
        return Gradients(gx=shared.get("gx"), gW=shared.get("gw"), gb=shared.get("gb"))
    if not _fits_a_message(problem.x, problem.W, problem.y):
        return _gradients_streamed(stub, request, problem, x, W, gy, wanted)
    raw: dict[str, Buffer] = {field: elements_of(array) for field, array in operands.items()}
    response = stub.deconvolve_grad(Envelope(request, raw))
    return Gradients(
        gx=_array("gx", response.message.gx, response.raw) if wanted.gx else None,
        gW=_array("gw", response.message.gw, response.raw) if wanted.gW else None,
        gb=_array("gb", response.message.gb, response.raw) if wanted.gb else None,
    )


def _gradients_streamed(
    stub: Stub,
    request: pb.DeconvolveGradRequest,
    problem: Problem,
    x: Array,
    W: Array,
    gy: Array,
    wanted: Wanted,
) -> Gradients:
    step = _slice_samples_count(problem, problem.x, problem.y)
    header = pb.DeconvolveGradStreamHeader(request=request, slice_samples_count=step)

    def parts() -> Iterator[bytes]:
        yield pb.DeconvolveGradStreamRequest(header=header).SerializeToString()
        if wanted.gx:
            yield from chunks_of(W)
        yield from _sliced([x, gy] if wanted.gW else [gy], step)

    def receive(reader: ChunkReader[pb.DeconvolveGradStreamResponse]) -> Gradients:
        reader.header()
        gx = reader.read("gx", problem.x) if wanted.gx else None
        gW = reader.read("gW", problem.W) if wanted.gW else None
        gb = reader.read("gb", problem.b) if wanted.gb else None
        reader.expect_end()
        return Gradients(gx, gW, gb)

    return stub.deconvolve_grad_stream(parts, receive)


@lru_cache(_REMEMBERED_COUNT)
def _request(problem: Problem, options: Options, *, with_b: bool) -> pb.DeconvolveRequest:
    """Return what describes a call of Deconvolve. It is not to be changed: it serves every such call."""
    return pb.DeconvolveRequest(
        x=message_from_spec(problem.x),
        w=message_from_spec(problem.W),
        b=message_from_spec(problem.b) if with_b else None,
        geometry=message_from_geometry(problem.geometry),
        options=message_from_options(options),
    )


@lru_cache(_REMEMBERED_COUNT)
def _grad_request(problem: Problem, options: Options, wanted: Wanted) -> pb.DeconvolveGradRequest:
    """Return what describes a call of DeconvolveGrad, in the manner of `_request`."""
    return pb.DeconvolveGradRequest(
        x=message_from_spec(problem.x),
        w=message_from_spec(problem.W),
        gy=message_from_spec(problem.y),
        geometry=message_from_geometry(problem.geometry),
        options=message_from_options(options),
        wanted=pb.GradientMask(gx=wanted.gx, gw=wanted.gW, gb=wanted.gb),
    )


def _fits_a_message(*tensors: TensorSpec) -> bool:
    return sum(spec.nbytes for spec in tensors) <= _MAX_UNARY_BYTES


def _slice_samples_count(problem: Problem, *tensors: TensorSpec) -> int:
    sample_bytes = sum(spec.nbytes for spec in tensors) // max(problem.n, 1)
    return max(_SLICE_BYTES // max(sample_bytes, 1), 1)


def _sliced(arrays: list[Array], step: int) -> Iterator[bytes]:
    """Yield the chunks of arrays that have samples in common, a slice of each in turn."""
    for samples in slices(len(arrays[0]), step):
        for array in arrays:
            yield from chunks_of(array[samples])


def _array(field: str, message: pb.Tensor, raw: Mapping[str, Buffer]) -> Array:
    """Return a tensor of a response as an array of the caller's own."""
    return np.array(array_from_message(field, message, raw.get(field)))
