"""The ways of a tensor there and back: each a context manager that gives a function from array to array."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import grpc
import numpy as np
import pyarrow
import pyarrow.flight

import deconvd_client
from benchmarks.transport.servers import LENGTH, METHOD
from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.grpc_options import GRPC_OPTIONS
from deconvd.wire.tensor import message_from_array

__all__ = ["ONE", "PATHS", "TCP", "UNIX", "RoundTrip", "run_server"]

RoundTrip = Callable[[Array], Array]

_BATCH_BYTES = 1 << 20
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

ONE = np.ones((1, 1, 1, 1), np.float32)
"""The filter with which our server, whose device returns x, is called."""

TCP, UNIX = "127.0.0.1:0", "unix:{directory}/socket"
"""Addresses for `run_server`."""


@contextmanager
def run_server(kind: str, address: str, *options: str) -> Iterator[str]:
    """Run one of the servers in a process of its own, and give what a client connects to.

    Args:
        kind: Its name in `SERVERS`.
        address: Where it listens: `TCP` or `UNIX`.
        options: What it is called with besides.
    """
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "benchmarks.transport.servers", kind]
        process = subprocess.Popen(
            [*command, address.format(directory=directory), *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()
            process.communicate()


@contextmanager
def memcpy() -> Iterator[RoundTrip]:
    """A copy in memory, one way."""
    copies: dict[int, Array] = {}

    def copy(x: Array) -> Array:
        y = copies.setdefault(x.nbytes, np.ones_like(x))
        np.copyto(y, x)
        return y

    yield copy


@contextmanager
def deconvd(address: str, transport: str) -> Iterator[RoundTrip]:
    """Our client and our daemon, without shared memory."""
    with (
        run_server("deconvd", address) as target,
        deconvd_client.connect(target, transport=transport) as F,
    ):
        yield lambda x: F.deconvolution_2d(x, ONE)


@contextmanager
def shared_memory(*, with_empty: bool) -> Iterator[RoundTrip]:
    """Our client and our daemon by shared memory; x lies there already where `with_empty`."""
    with (
        run_server("deconvd", UNIX) as target,
        deconvd_client.connect(target, transport="shared_memory") as F,
    ):
        inside: dict[int, Array] = {}

        def call(x: Array) -> Array:
            if with_empty and x.nbytes not in inside:
                inside[x.nbytes] = F.empty(x.shape, x.dtype)
                np.copyto(inside[x.nbytes], x)
            return F.deconvolution_2d(inside[x.nbytes] if with_empty else x, ONE)

        yield call


@contextmanager
def raw_tcp() -> Iterator[RoundTrip]:
    """A bare TCP socket."""
    with run_server("raw_tcp", TCP) as target:
        host, _, port = target.rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield partial(_exchange, connection)


def _exchange(connection: socket.socket, x: Array) -> Array:
    connection.sendall(LENGTH.pack(x.nbytes))
    connection.sendall(x.data.cast("B"))
    y = np.empty_like(x)
    target, received = y.data.cast("B"), 0
    while received < x.nbytes:
        received += connection.recv_into(target[received:])
    return y


@contextmanager
def bare_grpc() -> Iterator[RoundTrip]:
    """Unary gRPC of raw bytes, with default options."""
    with (
        run_server("bare_grpc", TCP) as target,
        grpc.insecure_channel(target, _UNLIMITED) as channel,
    ):
        rpc: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        yield lambda x: np.frombuffer(rpc(x.tobytes()), x.dtype).reshape(x.shape)


@contextmanager
def bare_grpc_stream() -> Iterator[RoundTrip]:
    """A gRPC stream of raw bytes in chunks of a mebibyte, with our options: what grpcio leaves our streams."""
    with (
        run_server("bare_grpc_stream", TCP) as target,
        grpc.insecure_channel(target, [*_UNLIMITED, *GRPC_OPTIONS]) as channel,
    ):
        rpc: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
        yield partial(_stream, rpc)


def _stream(rpc: grpc.StreamStreamMultiCallable[bytes, bytes], x: Array) -> Array:
    source, y = x.data.cast("B"), np.empty_like(x)
    target, filled = y.data.cast("B"), 0
    chunks = (bytes(source[i : i + _BATCH_BYTES]) for i in range(0, x.nbytes, _BATCH_BYTES))
    for chunk in rpc(chunks):
        target[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    return y


@contextmanager
def stock_grpc() -> Iterator[RoundTrip]:
    """Unary gRPC of our schema, with the generated classes and default options."""
    with (
        run_server("stock_grpc", TCP) as target,
        grpc.insecure_channel(target, _UNLIMITED) as channel,
    ):
        stub = pb_grpc.DeconvolutionServiceStub(channel)

        def call(x: Array) -> Array:
            request = pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(ONE))
            return np.frombuffer(stub.Deconvolve(request).y.raw, x.dtype).reshape(x.shape)

        yield call


@contextmanager
def flight(address: str) -> Iterator[RoundTrip]:
    """Arrow Flight's DoExchange, in batches of a mebibyte."""
    with run_server("flight", address) as target:
        scheme = "grpc+unix://" if target.startswith("unix:") else "grpc+tcp://"
        with pyarrow.flight.FlightClient(scheme + target.removeprefix("unix:")) as client:
            yield partial(_fly, client)


def _fly(client: Any, x: Array) -> Array:
    schema = pyarrow.schema([("bytes", pyarrow.uint8())])
    descriptor = pyarrow.flight.FlightDescriptor.for_command(b"echo")
    writer, reader = client.do_exchange(descriptor)
    flat = x.reshape(-1).view(np.uint8)
    y = np.empty_like(flat)
    with writer:
        writer.begin(schema)
        filled = 0
        for start in range(0, len(flat), _BATCH_BYTES):
            batch = pyarrow.array(flat[start : start + _BATCH_BYTES])
            writer.write_batch(pyarrow.record_batch([batch], schema))
            filled = _land(reader, y, filled)
        writer.done_writing()
        while filled < len(y):
            filled = _land(reader, y, filled)
    return y.view(x.dtype).reshape(x.shape)


def _land(reader: Any, y: Array, filled: int) -> int:
    batch = reader.read_chunk().data.column(0).to_numpy()
    y[filled : filled + len(batch)] = batch
    return filled + len(batch)


PATHS: dict[str, Callable[[], AbstractContextManager[RoundTrip]]] = {
    "memcpy": memcpy,
    "shared_memory": partial(shared_memory, with_empty=False),
    "shared_memory_empty": partial(shared_memory, with_empty=True),
    "unix": partial(deconvd, UNIX, "unix"),
    "tcp": partial(deconvd, TCP, "tcp"),
    "grpc_tcp": partial(deconvd, TCP, "grpc"),
    "raw_tcp": raw_tcp,
    "bare_grpc": bare_grpc,
    "bare_grpc_stream": bare_grpc_stream,
    "stock_grpc": stock_grpc,
    "flight_unix": partial(flight, UNIX),
    "flight_tcp": partial(flight, TCP),
}
