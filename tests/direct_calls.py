"""Calls by direct lines, frame by frame, for tests from the outside."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np

import deconvd_client
from deconvd.direct.connection_errors import ConnectionTimeoutError
from deconvd.direct.events import (
    ANY_INSTANCE,
    Answer,
    CallFailure,
    CallHead,
    EndOfStream,
    Hello,
    MethodCode,
)
from deconvd.direct.frame_stream import FrameStream
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.status import error_from_status
from deconvd.wire.stream_parts import PendingElements
from deconvd.wire.tensor import message_from_array
from deconvd_client.transports.direct.connectors import Connector, InfoFetcher, connector_for
from tests.deadlines import short_deadline
from tests.processes import wait_until
from tests.servers import ServerProcess, only_server
from tests.stream_pairs import client_stream

__all__ = [
    "REQUEST",
    "W",
    "X",
    "calls_path",
    "connect_from",
    "connect_stream_from",
    "get_server_info",
    "is_serving",
    "open_stream",
    "open_with_retries",
    "receive_answer",
    "receive_failure",
    "send_call",
    "target_of",
    "wait_until_idle",
]

X = np.arange(36, dtype=np.float32).reshape(1, 4, 3, 3)
W = np.ones((4, 2, 2, 2), np.float32)
REQUEST = pb.DeconvolveRequest(x=message_from_array(X), w=message_from_array(W))


def target_of(server: ServerProcess, transport: str) -> str:
    """Return what a client connects to for a transport."""
    return server.targets[transport == "tcp"]


def get_server_info(server: ServerProcess) -> pb.GetServerInfoResponse:
    """Return what a server says of itself."""
    with deconvd_client.connect(server.targets[-1], transport="grpc") as F:
        return only_server(F).route.server_info(short_deadline())


def calls_path(server: ServerProcess) -> Path:
    """Return the path of the socket for direct calls beside a server's first Unix socket."""
    return Path(f"{server.target.removeprefix('unix:')}.calls")


def open_stream(server: ServerProcess, transport: str = "unix") -> FrameStream:
    way = connector_for(target_of(server, transport))
    assert way is not None
    return open_with_retries(way, lambda: get_server_info(server))


def open_with_retries(way: Connector, ask: InfoFetcher) -> FrameStream:
    """Return a line, however long the server takes: clients make their calls by gRPC meanwhile."""
    deadline = short_deadline()
    while True:
        try:
            line = way.connect(ask, 5)
        except ConnectionTimeoutError:
            assert deadline.remaining_s(), "the server opens no line"
        else:
            line.set_deadline(60)  # what it was opened with is short
            return line


def connect_from(host: str, port: int, receive_buffer_bytes: int = 0) -> socket.socket:
    """Return a connection to a port of this host, from any address of the loopback.

    Args:
        receive_buffer_bytes: How much the system may receive before it is read; 0 for as much as it likes.
    """
    connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if receive_buffer_bytes:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        connection.settimeout(5)
        connection.bind((host, 0))
        connection.connect(("127.0.0.1", port))
    except BaseException:
        connection.close()
        raise
    return connection


def connect_stream_from(
    host: str, port: int, token: str = "", receive_buffer_bytes: int = 0
) -> FrameStream:
    """Return a line to a port of this host, from any address of the loopback."""
    line = client_stream(connect_from(host, port, receive_buffer_bytes))
    line.set_deadline(60)
    line.send(Hello(ANY_INSTANCE, token))
    assert isinstance(line.next_event(), Hello)
    return line


def send_call(
    line: FrameStream,
    method: MethodCode,
    message: bytes,
    *,
    timeout_s: float = 30,
    is_early: bool = False,
) -> None:
    line.send(CallHead(method, timeout_s, message, is_early))


def receive_answer(line: FrameStream) -> Answer | EndOfStream | CallFailure:
    """Return what a call ends with."""
    while True:
        event = line.next_event()
        if isinstance(event, PendingElements):
            line.read_into(np.empty(event.size_bytes, np.uint8))
        elif isinstance(event, (Answer, EndOfStream, CallFailure)):
            return event


def receive_failure(line: FrameStream) -> Exception:
    """Return the error that a call ends with."""
    event = receive_answer(line)
    assert isinstance(event, CallFailure), event
    return error_from_status(event.status)


def is_serving(line: FrameStream) -> bool:
    """Make a call, and return whether it was answered well."""
    send_call(line, MethodCode.Deconvolve, REQUEST.SerializeToString())
    event = receive_answer(line)
    assert isinstance(event, Answer), event
    return list(pb.DeconvolveResponse.FromString(event.message).y.shape) == [1, 2, 4, 4]


def wait_until_idle(server: ServerProcess) -> None:
    """Wait until no call is under way."""
    with deconvd_client.connect(server.target, transport="grpc") as F:

        def is_idle() -> bool:
            load = F.server_info().devices[0]
            return not load.running_calls_count and not load.used_bytes

        wait_until(is_idle)
