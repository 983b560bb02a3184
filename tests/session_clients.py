"""Clients that keep tensors on a server with nothing but the generated stubs, for tests from the outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest

from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.digest import digest_of
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.tensor import element_type_from_number, elements_of, message_from_spec

__all__ = [
    "SessionClient",
    "array_of",
    "error_of",
    "open_session",
    "raw_tensor",
    "remember_stream",
    "tensor_by_digest",
    "tensor_by_handle",
    "tensor_header",
]


def error_of(failure: pytest.ExceptionInfo[grpc.RpcError]) -> Any:
    """Return the error that a failed call stands for."""
    return error_from_rpc(failure.value)


def raw_tensor(array: Array) -> pb.Tensor:
    """Return the message of an array with its elements."""
    message = message_from_spec(spec_of(array))
    message.raw = bytes(elements_of(array))
    return message


def tensor_header(*shape: int) -> pb.Tensor:
    """Return the message of a tensor of float32, without elements."""
    return pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=shape)


def tensor_by_handle(array: Array, handle: bytes) -> pb.Tensor:
    """Return the message of an array that is kept under a handle."""
    message = message_from_spec(spec_of(array))
    message.resident.handle = handle
    return message


def tensor_by_digest(array: Array) -> pb.Tensor:
    """Return the message of an array by what it is."""
    message = message_from_spec(spec_of(array))
    message.digest.CopyFrom(digest_of(array))
    return message


def array_of(message: pb.Tensor, elements: bytes | None = None) -> Array:
    """Return the array of a message, whose elements may have come apart from it."""
    dtype = element_type_from_number(message.element_type)
    flat = np.frombuffer(message.raw if elements is None else elements, dtype)
    return flat.reshape(message.shape)


def remember_stream(
    session: bytes, x: Array, W: Array, **fields: Any
) -> Iterator[pb.DeconvolveStreamRequest]:
    """Yield the parts of a stream that computes y, and has the server remember W."""
    request = pb.DeconvolveRequest(
        x=message_from_spec(spec_of(x)),
        w=message_from_spec(spec_of(W)),
        session=session,
        remember=pb.OperandsToRemember(w=True),
        **fields,
    )
    header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=len(x))
    yield pb.DeconvolveStreamRequest(header=header)
    yield pb.DeconvolveStreamRequest(chunk=bytes(elements_of(W)))
    yield pb.DeconvolveStreamRequest(chunk=bytes(elements_of(x)))


class SessionClient:
    """A client that holds a session."""

    def __init__(self, channel: grpc.Channel, tenant_key: bytes = b"", resume: bytes = b"") -> None:
        self.channel = channel
        self.stub = pb_grpc.DeconvolutionServiceStub(channel)
        self._heartbeats: SimpleQueue[pb.HoldSessionRequest | None] = SimpleQueue()
        self._heartbeats.put(pb.HoldSessionRequest(session=resume, tenant_key=tenant_key))
        self.stream = self.stub.HoldSession(iter(self._heartbeats.get, None))
        try:
            self.opened: pb.HoldSessionResponse = next(self.stream)
        except BaseException:
            self._heartbeats.put(None)
            raise
        self.session: bytes = self.opened.session

    def send_heartbeat(self) -> None:
        """Give a sign of life."""
        self._heartbeats.put(pb.HoldSessionRequest())

    def close(self) -> None:
        """End the session, and wait until it has ended."""
        self._heartbeats.put(None)
        assert list(self.stream) == []

    def cancel(self) -> None:
        """Let the stream break."""
        self.stream.cancel()
        self._heartbeats.put(None)  # lets gRPC's thread that takes signs end

    def put(self, array: Array, chunk_bytes: int = 1 << 20) -> bytes:
        """Keep an array, and return its handle."""
        header = pb.PutTensorHeader(session=self.session, tensor=message_from_spec(spec_of(array)))
        elements = bytes(elements_of(array))
        parts = [pb.PutTensorRequest(header=header)] + [
            pb.PutTensorRequest(chunk=elements[start : start + chunk_bytes])
            for start in range(0, len(elements), chunk_bytes)
        ]
        return self.stub.PutTensor(iter(parts)).resident.handle

    def get(self, handle: bytes) -> Array:
        """Return what is kept under a handle."""
        request = pb.GetTensorRequest(session=self.session, resident=pb.Resident(handle=handle))
        first, *chunks = self.stub.GetTensor(request)
        return array_of(first.header, b"".join(part.chunk for part in chunks))

    def drop(self, *handles: bytes) -> None:
        """Drop what is kept under handles."""
        residents = [pb.Resident(handle=handle) for handle in handles]
        self.stub.DropTensors(pb.DropTensorsRequest(session=self.session, residents=residents))

    def info(self) -> pb.GetServerInfoResponse:
        """Return what the server says of itself to the session."""
        return self.stub.GetServerInfo(pb.GetServerInfoRequest(session=self.session))

    def resident_bytes(self) -> int:
        """Return what all that is kept for its tenant counts for on the server's devices."""
        return sum(cache.size_bytes for cache in self._resident_caches())

    def resident_count(self) -> int:
        """Return how many tensors are kept for its tenant on the server's devices."""
        return sum(cache.count for cache in self._resident_caches())

    def _resident_caches(self) -> Iterator[pb.Cache]:
        for device in self.info().devices:
            yield from (cache for cache in device.caches if cache.name == "resident tensors")


@contextmanager
def open_session(
    target: str, tenant_key: bytes = b"", resume: bytes = b""
) -> Iterator[SessionClient]:
    """Run a client for the block; its stream breaks at the end, if it is not closed before."""
    with grpc.insecure_channel(target) as channel:
        held = SessionClient(channel, tenant_key, resume)
        try:
            yield held
        finally:
            held.cancel()
