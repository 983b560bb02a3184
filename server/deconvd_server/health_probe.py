"""The command `deconvd-health`: asks a server for its health, and costs far less than to import a gRPC library."""

from __future__ import annotations

import os
import socket
import sys
import time

__all__ = ["main", "read_health"]

_USAGE = """\
Usage: deconvd-health [TARGET]

Ask a deconvd server whether it serves, for health checks of containers. It prints the answer, and takes some
hundredths of a second of a processor.

TARGET is unix:path or host:port. By default it is what DECONVD_TARGET says, or else 127.0.0.1:50051. TLS and tokens
are not supported: where TCP wants them, name a Unix socket of the server, or the port of --health-port.

Exit codes: 0 if the server serves, 1 if it does not serve or cannot be reached, 2 if TARGET is wrong."""

_TIMEOUT_S = 8.0
"""How long a probe may take. A server whose processors are all busy answers later than others."""

_MAX_PORT = 65535
_PORT_DIGITS = 5

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEAD_BYTES = 9
_MAX_FRAME_BYTES = 1 << 14
"""HTTP/2 forbids larger frames to servers whose client has not allowed them."""

_DATA, _HEADERS, _RESET, _SETTINGS, _GOAWAY = 0, 1, 3, 4, 7
_END_STREAM, _END_HEADERS = 1, 4
_CONNECTION, _STREAM = 0, 1
_EMPTY_MESSAGE = bytes(5)
"""A HealthCheckRequest without a service asks for the server as a whole. gRPC puts a flag and the length before it."""

_ANSWERS = {b"\0\0\0\0\2\x08\1": "SERVING", b"\0\0\0\0\2\x08\2": "NOT_SERVING"}
"""Whole messages of HealthCheckResponse, in which the number of the status is the only field."""

_FIELDS = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/grpc.health.v1.Health/Check",
    ":authority": "localhost",
    "te": "trailers",
    "content-type": "application/grpc",
}


def main() -> None:
    """Print the health of a server, and exit with 0 if it serves."""
    arguments = sys.argv[1:]
    if "--help" in arguments:
        print(_USAGE)
        return
    if len(arguments) > 1:
        _exit_with_usage(f"one TARGET is allowed, got {' '.join(arguments)}")
    target = (arguments or [os.environ.get("DECONVD_TARGET") or "127.0.0.1:50051"])[0]
    if not _is_target(target):
        _exit_with_usage(
            f"TARGET must be one unix:path or host:port, port 1 to 65535, got {target!r}"
        )
    try:
        health = read_health(target)
    except OSError as error:
        sys.exit(f"deconvd-health: {target}: {error}")
    print(f"{target}: {health}")
    if health != "SERVING":
        sys.exit(1)


def read_health(target: str, timeout_s: float = _TIMEOUT_S) -> str:
    """Return ``SERVING`` or ``NOT_SERVING``.

    Args:
        target: ``unix:path`` or ``host:port``.
        timeout_s: How long it may take, in seconds.

    Raises:
        OSError: The server cannot be reached, or does not answer as a gRPC server with health.
    """
    deadline_s = time.monotonic() + timeout_s
    with _connect(target, timeout_s) as connection:
        connection.sendall(_request())
        message = b""
        while True:
            kind, flags, stream, payload = _read_frame(connection, deadline_s)
            # Settings and pings need no answer, since the connection ends before a server waits for one.
            if kind == _DATA:
                message += payload
            if kind == _GOAWAY or (stream == _STREAM and (kind == _RESET or flags & _END_STREAM)):
                break
    if message not in _ANSWERS:
        raise ConnectionError("the server does not tell its health: it may want a token")
    return _ANSWERS[message]


def _is_target(target: str) -> bool:
    if target.startswith("unix:"):
        return target != "unix:"
    host, _, port = target.rpartition(":")
    if not host or set(host) & set("/,"):  # DECONVD_TARGET may name several servers, or a proxy
        return False
    try:
        host.encode("idna")  # as socket.getaddrinfo does
    except UnicodeError:
        return False
    is_number = port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS
    return (
        is_number and 1 <= int(port) <= _MAX_PORT
    )  # the system would take a larger one modulo 65536


def _exit_with_usage(error: str) -> None:
    print(f"{_USAGE}\n\ndeconvd-health: {error}", file=sys.stderr)
    sys.exit(2)


def _connect(target: str, timeout_s: float) -> socket.socket:
    if not target.startswith("unix:"):
        host, _, port = target.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout_s)
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(timeout_s)
        connection.connect(target.removeprefix("unix:").removeprefix("//"))
    except BaseException:
        connection.close()
        raise
    return connection


def _request() -> bytes:
    """Return all that the probe ever sends: one call of Check."""
    # Each header is a literal without compression (RFC 7541, 6.2.2); lengths under 127 take one byte.
    headers = b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in _FIELDS.items()
    )
    return (
        _PREFACE
        + _frame(_SETTINGS, 0, _CONNECTION, b"")
        + _frame(_HEADERS, _END_HEADERS, _STREAM, headers)
        + _frame(_DATA, _END_STREAM, _STREAM, _EMPTY_MESSAGE)
    )


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big")
    return head + payload


def _read_frame(connection: socket.socket, deadline_s: float) -> tuple[int, int, int, bytes]:
    """Return a frame's type, flags, stream and payload."""
    head = _read(connection, _HEAD_BYTES, deadline_s)
    size = int.from_bytes(head[:3], "big")
    if size > _MAX_FRAME_BYTES:
        raise ConnectionError("the server does not speak HTTP/2")
    payload = _read(connection, size, deadline_s)
    return head[3], head[4], int.from_bytes(head[5:], "big"), payload


def _read(connection: socket.socket, size: int, deadline_s: float) -> bytes:
    data = b""
    while len(data) < size:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left_s)
        received = connection.recv(size - len(data))
        if not received:
            raise ConnectionError("the server closed the connection: a port with TLS does so")
        data += received
    return data


if __name__ == "__main__":
    main()
