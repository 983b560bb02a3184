"""Servers that send back what they get, each run in a process of its own: `python -m ... KIND ADDRESS...`."""

from __future__ import annotations

import math
import signal
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pyarrow.flight

from benchmarks.ports import free_port
from deconvd.host.malloc import keep_freed_memory
from deconvd.host.parallel_copy import copy_into
from deconvd.model.operation import Operation
from deconvd.model.problem import Problem
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.grpc_options import GRPC_OPTIONS
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.access.tokens import TokenFile
from deconvd_server.daemon import Daemon
from deconvd_server.device import CacheState, DeviceInfo
from deconvd_server.settings import Settings

__all__ = ["LENGTH", "MAX_MESSAGE_BYTES", "METHOD", "SERVERS"]

LENGTH = struct.Struct("<Q")
"""What stands before the bytes on a bare socket."""

METHOD = "/benchmark.Echo/Echo"
"""The bare gRPC method: bytes to the same bytes."""

MAX_MESSAGE_BYTES = 2**31 - 1


class EchoDevice:
    """A device whose y is x, or its first channels, so that only the transport takes time.

    For 1x1 filters that are the identity.
    """

    info = DeviceInfo("echo", "echo", 1 << 40, 0, 1 << 40, 4)
    caches: tuple[CacheState, ...] = ()
    waiting_since_s = math.inf

    def wait_until_warm(self) -> None:
        """Nothing has to warm up."""

    def footprint_bytes(self, *_: Any) -> int:
        """Nothing is taken."""
        return 0

    def run(
        self,
        operation: Operation,
        problem: Problem,
        operands: Mapping[str, Any],
        places: Mapping[str, Any],
        options: Any,
        call: Any,
    ) -> None:
        """Put x, or its first channels, where y is to be."""
        if problem.y == problem.x:
            copy_into(places["y"], operands["x"])
        else:
            places["y"][:] = operands["x"][:, : problem.W.shape[1]]

    def empty(self, *_: Any, **_options: Any) -> Any:
        """No benchmark asks for tensors that stay."""
        raise AssertionError("no tensor stays")

    lend = free = write = read = allocate_host_array = empty

    def register(self, *_: Any) -> Callable[[], None]:
        """Do nothing: all memory is alike."""
        return lambda: None

    def close(self) -> None:
        """Nothing is held."""


def serve_deconvd(address: str, tokens: str = "", cert: str = "", key: str = "") -> None:
    """Serve with our own daemon, in a process that is set as the command sets it.

    Args:
        address: Where to listen.
        tokens: File of tokens; empty to serve everyone.
        cert, key: Files of TLS; empty to serve without.
    """
    keep_freed_memory()
    daemon = Daemon(
        Settings(
            [address],
            MAX_MESSAGE_BYTES,
            drain_timeout_s=1,
            direct_port=free_port(),  # a proxy may want it on another address of this host
            shared_memory_bytes=4 << 30,
            authenticator=Authenticator(TokenFile(Path(tokens)) if tokens else None),
            tls=ServerTls(Path(cert), Path(key), None) if cert else None,
        )
    )
    daemon.serve(lambda: [EchoDevice()])
    _ready(daemon.addresses[0])


def serve_raw_tcp(address: str) -> None:
    """Serve on a bare TCP socket: whole messages, one connection."""
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))) as listener:
        print(f"{host}:{listener.getsockname()[1]}", flush=True)
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray())
        while header := connection.recv(LENGTH.size, socket.MSG_WAITALL):
            (length,) = LENGTH.unpack(header)
            if len(buffer) != length:
                buffer = memoryview(bytearray(length))
            received = 0
            while received < length:
                received += connection.recv_into(buffer[received:])
            connection.sendall(buffer)


def serve_sink(address: str) -> None:
    """Take whole messages on a bare TCP socket, one connection after the other, and answer each by one byte."""
    host, _, port = address.rpartition(":")
    with socket.create_server((host, int(port))) as listener:
        print(f"{host}:{listener.getsockname()[1]}", flush=True)
        buffer = memoryview(bytearray(1 << 20))
        while True:
            connection, _ = listener.accept()
            with connection:
                while header := connection.recv(LENGTH.size, socket.MSG_WAITALL):
                    (remaining,) = LENGTH.unpack(header)
                    while remaining:
                        remaining -= connection.recv_into(buffer[: min(remaining, len(buffer))])
                    connection.sendall(b"1")


def serve_bare_grpc(address: str) -> None:
    """Serve unary gRPC of raw bytes, without protobuf."""
    handler = grpc.method_handlers_generic_handler(
        "benchmark.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(lambda data, _: data)}
    )
    _serve_grpc(address, lambda server: server.add_generic_rpc_handlers((handler,)))


def serve_bare_grpc_stream(address: str) -> None:
    """Serve a gRPC stream of raw bytes with our options: each message goes back as it comes."""
    handler = grpc.method_handlers_generic_handler(
        "benchmark.Echo", {"Echo": grpc.stream_stream_rpc_method_handler(lambda chunks, _: chunks)}
    )
    _serve_grpc(address, lambda server: server.add_generic_rpc_handlers((handler,)), GRPC_OPTIONS)


class _StockServicer(pb_grpc.DeconvolutionServiceServicer):
    def Deconvolve(self, request: pb.DeconvolveRequest, context: Any) -> pb.DeconvolveResponse:
        return pb.DeconvolveResponse(y=request.x)


def serve_stock_grpc(address: str) -> None:
    """Serve our schema with the generated classes alone."""
    _serve_grpc(
        address,
        lambda server: pb_grpc.add_DeconvolutionServiceServicer_to_server(
            _StockServicer(),  # type: ignore[abstract]  # it has what is measured
            server,
        ),
    )


def _serve_grpc(
    address: str,
    add_handlers: Callable[[grpc.Server], None],
    options: Sequence[tuple[str, int | str]] = (),
) -> None:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    server = grpc.server(ThreadPoolExecutor(4), options=[*unlimited, *options])
    add_handlers(server)
    port = server.add_insecure_port(address)
    server.start()
    _ready(address if address.startswith("unix:") else f"127.0.0.1:{port}")


class _FlightServer(pyarrow.flight.FlightServerBase):  # type: ignore[misc]  # pyarrow has no types
    def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
        began = False
        for chunk in reader:
            if not began:
                writer.begin(chunk.data.schema)
                began = True
            writer.write_batch(chunk.data)


def serve_flight(address: str) -> None:
    """Serve Arrow Flight's DoExchange, batch by batch."""
    scheme = "grpc+unix://" if address.startswith("unix:") else "grpc+tcp://"
    with _FlightServer(scheme + address.removeprefix("unix:")) as server:
        _ready(address if address.startswith("unix:") else f"127.0.0.1:{server.port}")


def _ready(address: str) -> None:
    print(address, flush=True)
    signal.pause()


def _names() -> Iterator[tuple[str, Callable[..., None]]]:
    for name, value in globals().items():
        if name.startswith("serve_"):
            yield name.removeprefix("serve_"), value


SERVERS = dict(_names())

if __name__ == "__main__":
    SERVERS[sys.argv[1]](*sys.argv[2:])
