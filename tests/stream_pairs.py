"""Both ends of a line in one process, and what goes against the rules of the protocol on it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.events import ANY_INSTANCE, CallHead, Hello, MethodCode
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.protocol import DirectProtocol, Role

__all__ = [
    "client_stream",
    "connected_streams",
    "descriptor_of",
    "overlapped_streams",
    "send_raw",
    "server_stream",
]


def client_stream(connection: socket.socket, instance: bytes = ANY_INSTANCE) -> FrameStream:
    return FrameStream(SocketStream(connection), DirectProtocol(Role.CLIENT, instance))


def server_stream(connection: socket.socket, instance: bytes = ANY_INSTANCE) -> FrameStream:
    return FrameStream(SocketStream(connection), DirectProtocol(Role.SERVER, instance))


@contextmanager
def connected_streams() -> Iterator[tuple[FrameStream, FrameStream]]:
    """Give the block a client's end and its server's, which have greeted each other."""
    one, other = socket.socketpair()
    with client_stream(one) as client, server_stream(other) as server:
        for sender, receiver in ((client, server), (server, client)):
            sender.send(Hello(ANY_INSTANCE))
            receiver.next_event()
        yield client, server


@contextmanager
def overlapped_streams() -> Iterator[tuple[FrameStream, FrameStream]]:
    """Give the block a client's end and its server's in the middle of an early call."""
    with connected_streams() as (client, server):
        client.send(CallHead(MethodCode.Deconvolve, 30, b"", is_overlapped=True))
        server.next_event()
        yield client, server


def send_raw(line: FrameStream, data: bytes) -> None:
    """Send bytes, whatever the protocol says of them."""
    line._stream.write(data)


def descriptor_of(line: FrameStream) -> int:
    """Return the descriptor of the socket that carries a line."""
    stream = line._stream
    assert isinstance(stream, SocketStream)
    return stream.descriptor
