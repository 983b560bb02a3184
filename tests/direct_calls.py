"""Calls by direct lines, frame by frame, for tests from the outside."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np

import deconvd_client
from deconvd.direct.connection_errors import LineTimeoutError
from deconvd.direct.events import ANY_INSTANCE, Answer, CallHead, End, Failed, Hello, Method
from deconvd.direct.frame_stream import Line
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.status import error_from_status
from deconvd.wire.stream_parts import Ahead
from deconvd.wire.tensor import message_from_array
from deconvd_client.transports.direct.connectors import Ask, Way, way_to
from tests.deadlines import soon
from tests.line_pairs import client_line
from tests.processes import wait_until
from tests.servers import ServerProcess

__all__ = [
    "REQUEST",
    "W",
    "X",
    "answer",
    "calls_path",
    "connect_from",
    "failure",
    "line_from",
    "open_line",
    "open_patiently",
    "send_call",
    "serves",
    "target_of",
    "told_by",
    "wait_until_idle",
]

X = np.arange(36, dtype=np.float32).reshape(1, 4, 3, 3)
W = np.ones((4, 2, 2, 2), np.float32)
REQUEST = pb.DeconvolveRequest(x=message_from_array(X), w=message_from_array(W))


def target_of(server: ServerProcess, transport: str) -> str:
    """Return what a client connects to for a transport."""
    return server.targets[transport == "tcp"]


def told_by(server: ServerProcess) -> pb.GetServerInfoResponse:
    """Return what a server says of itself."""
    with deconvd_client.connect(server.targets[-1], transport="grpc") as F:
        return F._server.nearest.server_info(soon())


def calls_path(server: ServerProcess) -> Path:
    """Return the path of the socket for direct calls beside a server's first Unix socket."""
    return Path(f"{server.target.removeprefix('unix:')}.calls")


def open_line(server: ServerProcess, transport: str = "unix") -> Line:
    way = way_to(target_of(server, transport))
    assert way is not None
    return open_patiently(way, lambda: told_by(server))


def open_patiently(way: Way, ask: Ask) -> Line:
    """Return a line, however long the server takes: clients make their calls by gRPC meanwhile."""
    deadline = soon()
    while True:
        try:
            line = way.open(ask, 5)
        except LineTimeoutError:
            assert deadline.remaining_s(), "the server opens no line"
        else:
            line.set_deadline(60)  # what it was opened with is short
            return line


def connect_from(host: str, port: int) -> socket.socket:
    """Return a connection to a port of this host, from any address of the loopback."""
    return socket.create_connection(("127.0.0.1", port), 5, source_address=(host, 0))


def line_from(host: str, port: int) -> Line:
    """Return a line to a port of this host, from any address of the loopback."""
    line = client_line(connect_from(host, port))
    line.set_deadline(60)
    line.send(Hello(ANY_INSTANCE))
    assert isinstance(line.next_event(), Hello)
    return line


def send_call(
    line: Line, method: Method, message: bytes, *, timeout_s: float = 30, is_early: bool = False
) -> None:
    line.send(CallHead(method, timeout_s, message, is_early))


def answer(line: Line) -> Answer | End | Failed:
    """Return what a call ends with."""
    while True:
        event = line.next_event()
        if isinstance(event, Ahead):
            line.read_into(np.empty(event.size_bytes, np.uint8))
        elif isinstance(event, (Answer, End, Failed)):
            return event


def failure(line: Line) -> Exception:
    """Return the error that a call ends with."""
    event = answer(line)
    assert isinstance(event, Failed), event
    return error_from_status(event.status)


def serves(line: Line) -> bool:
    """Make a call, and return whether it was answered well."""
    send_call(line, Method.Deconvolve, REQUEST.SerializeToString())
    event = answer(line)
    assert isinstance(event, Answer), event
    return list(pb.DeconvolveResponse.FromString(event.message).y.shape) == [1, 2, 4, 4]


def wait_until_idle(server: ServerProcess) -> None:
    """Wait until no call is under way."""
    with deconvd_client.connect(server.target, transport="grpc") as F:

        def is_idle() -> bool:
            load = F.server_info().devices[0]
            return not load.running_calls_count and not load.used_bytes

        wait_until(is_idle)
