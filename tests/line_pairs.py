"""Both ends of a line in one process, and what goes against the rules of the protocol on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.events import ANY_INSTANCE, CallHead, Hello, Method
from deconvd.direct.frame_stream import Line
from deconvd.direct.protocol import DirectProtocol, Role

__all__ = ["client_line", "descriptor_of", "early_ends", "greeted_ends", "send_raw", "server_line"]


def client_line(connection: socket.socket, instance: bytes = ANY_INSTANCE) -> Line:
    return Line(SocketStream(connection), DirectProtocol(Role.CLIENT, instance))


def server_line(connection: socket.socket, instance: bytes = ANY_INSTANCE) -> Line:
    return Line(SocketStream(connection), DirectProtocol(Role.SERVER, instance))


@contextmanager
def greeted_ends() -> Iterator[tuple[Line, Line]]:
    """Give the block a client's end and its server's, which have greeted each other."""
    one, other = socket.socketpair()
    with client_line(one) as client, server_line(other) as server:
        for sender, receiver in ((client, server), (server, client)):
            sender.send(Hello(ANY_INSTANCE))
            receiver.next_event()
        yield client, server


@contextmanager
def early_ends() -> Iterator[tuple[Line, Line]]:
    """Give the block a client's end and its server's in the middle of an early call."""
    with greeted_ends() as (client, server):
        client.send(CallHead(Method.Deconvolve, 30, b"", is_early=True))
        server.next_event()
        yield client, server


def send_raw(line: Line, data: bytes) -> None:
    """Send bytes, whatever the protocol says of them."""
    line._stream.write(data)


def descriptor_of(line: Line) -> int:
    """Return the descriptor of the socket that carries a line."""
    stream = line._stream
    assert isinstance(stream, SocketStream)
    return stream.descriptor
