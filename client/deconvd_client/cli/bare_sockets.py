"""The bare program that calls are measured beside: bytes there and bytes back, by blocking sockets.

One server process has a thread for each connection, and each connection has a buffer that is kept. A client spreads a
call's bytes evenly over its connections; a connection sends its part of them, then receives its part of the result.
Nothing is computed, and nothing waits for the other connections of a call but the client's next call. The connections
may have TLS, by Python's `ssl.SSLSocket`. The server ends with the process that started it.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import numpy as np

from deconvd.model.dtypes import Array

__all__ = ["BareCertificate", "bare_calls", "bare_server"]

_BACKLOG = 128

_SIZES = struct.Struct("<QQ")
"""What a client says once on each connection: how many bytes it sends in a call, and how many it wants back."""


class BareCertificate(NamedTuple):
    """The files of a server's certificate and of its key, in PEM."""

    cert: str | os.PathLike[str]
    key: str | os.PathLike[str]


@contextmanager
def bare_server(
    *, is_unix: bool = False, certificate: BareCertificate | None = None
) -> Iterator[str]:
    """Run the server for the block, in a process of its own, and give its address: ``host:port``, or a path.

    Args:
        is_unix: Whether it listens at a Unix socket, not by TCP.
        certificate: What it shows to its clients; None for no TLS.
    """
    with tempfile.TemporaryDirectory(prefix="deconvd-") as folder:
        # bound here, so that nothing has to be waited for, and the server needs no folder that may be gone
        listener = socket.socket(socket.AF_UNIX if is_unix else socket.AF_INET)
        with listener:
            listener.bind(f"{folder}/bare.sock" if is_unix else ("127.0.0.1", 0))
            listener.listen(_BACKLOG)
            name = listener.getsockname()
            process = subprocess.Popen(  # noqa: S603 - this module
                [
                    *(sys.executable, "-m", "deconvd_client.cli.bare_sockets"),
                    *(str(listener.fileno()), *(certificate or ())),
                ],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # Ctrl-C must not end it before its clients
            )
        with process:
            try:
                yield name if is_unix else "{}:{}".format(*name)
            finally:
                process.kill()


@contextmanager
def bare_calls(
    address: str,
    connections_count: int,
    sent: Array,
    received: Array,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Callable[[], None]]:
    """Connect to the server, and give what makes a call: it sends an array of bytes and fills another.

    Args:
        address: The server's, as `bare_server` gives it.
        connections_count: How many connections share the bytes of a call.
        sent, received: The arrays.
        tls: Whom to trust; None for a server without TLS.
    """
    parts = zip(
        np.array_split(sent, connections_count),
        np.array_split(received, connections_count),
        strict=True,
    )
    with ExitStack() as stack:
        lanes: list[tuple[socket.socket, memoryview, memoryview]] = []
        for sent_part, received_part in parts:
            connection = stack.enter_context(_connect(address, tls))
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


def _connect(address: str, tls: ssl.SSLContext | None) -> socket.socket:
    host, _, port = address.rpartition(":")
    if host:
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return tls.wrap_socket(connection, server_hostname=host) if tls else connection
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


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


def _serve(descriptor: int, tls: ssl.SSLContext | None) -> None:
    """Serve at a socket that listens, until standard input ends: then the parent has gone."""
    listener = socket.socket(fileno=descriptor)
    threading.Thread(target=_accept, args=[listener, tls], daemon=True).start()
    sys.stdin.read()


def _server_context(*certificate: str) -> ssl.SSLContext | None:
    if not certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    return context


def _accept(listener: socket.socket, tls: ssl.SSLContext | None) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_serve_connection, args=[connection, tls], daemon=True).start()


def _serve_connection(accepted: socket.socket, tls: ssl.SSLContext | None) -> None:
    if accepted.family is socket.AF_INET:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with tls.wrap_socket(accepted, server_side=True) if tls else accepted as connection:
        header = bytearray(_SIZES.size)
        _receive(connection, memoryview(header))
        received_bytes, sent_bytes = _SIZES.unpack(header)
        # written, so that it has memory of its own: pages that were only read are all the same one
        sent = np.ones(sent_bytes, np.uint8).data
        received = memoryview(bytearray(received_bytes))
        while _receive(connection, received):
            connection.sendall(sent)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), _server_context(*sys.argv[2:]))
