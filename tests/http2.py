"""A gRPC client that sends what it likes, frame by frame: calls without a message, paths that no stub would send."""

from __future__ import annotations

import socket
from itertools import count

__all__ = ["METHODS", "SERVICE", "Http2Client", "frame"]

SERVICE = "/deconvd.v1.DeconvolutionService/"

METHODS = (
    *(SERVICE + name for name in ("Deconvolve", "DeconvolveStream", "GetTensor", "PutTensor")),
    SERVICE + "HoldSession",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)
"""One of each kind."""

_FRAME_BYTES = 1 << 14
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4


class Http2Client:
    """A connection to a gRPC server.

    Args:
        target: Of the server.
        address: From which TCP connections come; any of 127.0.0.0/8.
    """

    def __init__(self, target: str, address: str = "127.0.0.1") -> None:
        if target.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(target.removeprefix("unix:"))
        else:
            host, _, port = target.rpartition(":")
            self.socket = socket.create_connection((host, int(port)), source_address=(address, 0))
        self._ids = count(1, 2)
        self.socket.sendall(_PREFACE + frame(_SETTINGS, 0, 0, b""))

    def __enter__(self) -> Http2Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def begin(self, path: bytes | str) -> int:
        """Send a call's headers, and return its id."""
        path = path.encode() if isinstance(path, str) else path
        number = next(self._ids)
        self.socket.sendall(frame(_HEADERS, _END_HEADERS, number, _headers(path)))
        return number

    def send(self, number: int, message: bytes, *, is_last: bool = False) -> None:
        """Send a message of a call: not more than 64 KiB, which is as much as one may send unasked."""
        data = b"\0" + len(message).to_bytes(4, "big") + message
        pieces = [data[i : i + _FRAME_BYTES] for i in range(0, len(data), _FRAME_BYTES)]
        frames = [frame(_DATA, 0, number, piece) for piece in pieces]
        if is_last:
            frames.append(frame(_DATA, _END_STREAM, number, b""))
        self.socket.sendall(b"".join(frames))

    def read_until(self, text: bytes) -> None:
        """Read until the server has sent a text."""
        self.socket.settimeout(10)
        received = b""
        while text not in received:
            more = self.socket.recv(1 << 16)
            assert more, f"the server has closed the connection, after {received!r}"
            received += more


def frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    """Return a frame of a stream; of the connection as a whole if its number is 0."""
    return (
        len(payload).to_bytes(3, "big") + bytes([kind, flags]) + number.to_bytes(4, "big") + payload
    )


def _headers(path: bytes) -> bytes:
    """Return a header block, of literals that are not Huffman coded."""
    fields = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"test"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    return b"".join(b"\0" + _text(name) + _text(value) for name, value in fields)


def _text(text: bytes) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text
