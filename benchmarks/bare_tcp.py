"""The bare program that calls over TCP are measured beside: bytes there and bytes back, by blocking sockets.

One server process has a thread for each connection, and each connection has a buffer that is kept. A client spreads a
call's bytes evenly over its connections; a connection sends its part of them, then receives its part of the result.
Nothing is computed, and nothing waits for the other connections of a call but the client's next call.
"""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["bare_calls", "bare_server"]

_SIZES = struct.Struct("<QQ")
"""What a client says once on each connection: how many bytes it sends in a call, and how many it wants back."""


@contextmanager
def bare_server() -> Iterator[str]:
    """Run the server for the block, in a process of its own, and give its address, ``host:port``."""
    command = [sys.executable, "-m", "benchmarks.bare_tcp"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def bare_calls(
    address: str, connections_count: int, sent: Array, received: Array
) -> Iterator[Callable[[], None]]:
    """Connect to the server, and give what makes a call: it sends an array of bytes and fills another."""
    host, _, port = address.rpartition(":")
    parts = zip(
        np.array_split(sent, connections_count),
        np.array_split(received, connections_count),
        strict=True,
    )
    with ExitStack() as stack:
        lanes: list[tuple[socket.socket, memoryview, memoryview]] = []
        for sent_part, received_part in parts:
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(_SIZES.pack(sent_part.nbytes, received_part.nbytes))
            lanes.append((connection, sent_part.data, received_part.data))
        # the caller's thread serves the first connection itself
        threads = stack.enter_context(ThreadPoolExecutor(max(len(lanes) - 1, 1)))

        def call() -> None:
            others = [threads.submit(_exchange, *lane) for lane in lanes[1:]]
            _exchange(*lanes[0])
            for other in others:
                other.result()

        yield call


def _exchange(connection: socket.socket, sent: memoryview, received: memoryview) -> None:
    connection.sendall(sent)
    if not _receive(connection, received):
        raise ConnectionResetError("the bare server has closed the connection")


def _receive(connection: socket.socket, target: memoryview) -> bool:
    """Fill the target, and return whether all of its bytes came before the connection's end."""
    filled = 0
    while filled < len(target):
        count = connection.recv_into(target[filled:])
        if not count:
            return False
        filled += count
    return True


def _serve() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve_connection, args=[connection], daemon=True).start()


def _serve_connection(connection: socket.socket) -> None:
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        header = connection.recv(_SIZES.size, socket.MSG_WAITALL)
        received_bytes, sent_bytes = _SIZES.unpack(header)
        # written, so that it has memory of its own: pages that were only read are all the same one
        sent = np.ones(sent_bytes, np.uint8).data
        received = memoryview(bytearray(received_bytes))
        while _receive(connection, received):
            connection.sendall(sent)


if __name__ == "__main__":
    _serve()
