"""gRPC's frames by hand: a client that can send what it likes, from any address, and read nothing."""

from __future__ import annotations

import socket
import struct

__all__ = ["HEALTH", "REFLECTION", "SERVICE", "Http2"]

SERVICE = "/deconvd.v1.DeconvolutionService/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _WINDOW_UPDATE = 0, 1, 3, 4, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SIZE = 4
_ALL_WINDOW_BYTES = 2**31 - 1
_FRAME_BYTES = 16384
_CANCEL = 8


class Http2:
    """A connection. What it sends must fit into the windows that the server gives at first: 64 KiB in all.

    It closes the socket.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._last_stream = -1
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, _ALL_WINDOW_BYTES)
        window = struct.pack(">I", _ALL_WINDOW_BYTES - 65535)
        self._write(
            _PREFACE
            + _frame(_SETTINGS, settings)
            + _frame(_SETTINGS, b"", _ACK)
            + _frame(_WINDOW_UPDATE, window)
        )

    def begin(self, path: str) -> int:
        """Begin a call: send its headers, and return its stream."""
        self._last_stream += 2
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "soak"}
        fields |= {"te": "trailers", "content-type": "application/grpc"}
        block = b"".join(_field(name, value) for name, value in fields.items())
        self._write(_frame(_HEADERS, block, _END_HEADERS, self._last_stream))
        return self._last_stream

    def send(self, stream: int, message: bytes, *, is_last: bool = False) -> None:
        """Send a message of a call."""
        data = struct.pack(">?I", False, len(message)) + message
        for begin in range(0, len(data), _FRAME_BYTES):
            piece = data[begin : begin + _FRAME_BYTES]
            ends = is_last and begin + len(piece) == len(data)
            self._write(_frame(_DATA, piece, _END_STREAM if ends else 0, stream))

    def call(self, path: str, message: bytes, *, is_last: bool = True) -> int:
        """Begin a call, send its message, and return its stream."""
        stream = self.begin(path)
        self.send(stream, message, is_last=is_last)
        return stream

    def cancel(self, stream: int) -> None:
        """Give a call up."""
        self._write(_frame(_RESET, struct.pack(">I", _CANCEL), 0, stream))

    def send_raw(self, data: bytes) -> None:
        """Send bytes, whatever they mean."""
        self._write(data)

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _write(self, data: bytes) -> None:
        self._socket.sendall(data)


def _frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _field(name: str, value: str) -> bytes:
    """Return a header as HPACK has it, in plain text, and to be remembered by nobody."""
    texts = name.encode(), value.encode()
    return b"\0" + b"".join(bytes([len(text)]) + text for text in texts)
