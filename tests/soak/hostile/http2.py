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
_PIECE_BYTES = 1 << 20
_FIRST_WINDOW_BYTES = 65535
_WHOLE = 0
"""Stands for the connection where a stream does."""

_CANCEL = 8


class Http2:
    """A connection, which closes the socket. What the server sends is read for its windows alone.

    Args:
        answer_bytes: What the server may send of each answer; by default all.
    """

    def __init__(self, connection: socket.socket, answer_bytes: int = _ALL_WINDOW_BYTES) -> None:
        self._socket = connection
        self._last_stream = -1
        self._initial_window_bytes = _FIRST_WINDOW_BYTES
        self._windows = {_WHOLE: _FIRST_WINDOW_BYTES}  # by stream
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, answer_bytes)
        window = struct.pack(">I", _ALL_WINDOW_BYTES - _FIRST_WINDOW_BYTES)
        self._write(
            _PREFACE
            + _frame(_SETTINGS, settings)
            + _frame(_SETTINGS, b"", _ACK)
            + _frame(_WINDOW_UPDATE, window)
        )

    def begin(self, path: str) -> int:
        """Begin a call: send its headers, and return its stream."""
        self._last_stream += 2
        self._windows[self._last_stream] = self._initial_window_bytes
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "soak"}
        fields |= {"te": "trailers", "content-type": "application/grpc"}
        block = b"".join(_field(name, value) for name, value in fields.items())
        self._write(_frame(_HEADERS, block, _END_HEADERS, self._last_stream))
        return self._last_stream

    def send(
        self, stream: int, message: bytes, *, is_last: bool = False, lacking_bytes: int = 0
    ) -> None:
        """Send a message of a call, or one of which so many bytes never come."""
        view = memoryview(struct.pack(">?I", False, len(message) + lacking_bytes) + message)
        while view:
            size = min(len(view), _PIECE_BYTES, self._windows[_WHOLE], self._windows[stream])
            if size <= 0:
                self._hear()
                continue
            for window in (_WHOLE, stream):
                self._windows[window] -= size
            piece, view = view[:size], view[size:]
            flags = _END_STREAM if is_last and not view else 0
            frames = [piece[i : i + _FRAME_BYTES] for i in range(0, size, _FRAME_BYTES)]
            last = _frame(_DATA, bytes(frames.pop()), flags, stream)
            self._write(b"".join([_frame(_DATA, bytes(one), 0, stream) for one in frames]) + last)

    def call(self, path: str, message: bytes, *, is_last: bool = True) -> int:
        """Begin a call, send its message, and return its stream."""
        stream = self.begin(path)
        self.send(stream, message, is_last=is_last)
        return stream

    def cancel(self, stream: int) -> None:
        """Give a call up."""
        self._write(_frame(_RESET, struct.pack(">I", _CANCEL), 0, stream))

    def wait_for_reset(self, stream: int) -> None:
        """Read until the server breaks a call off. Raises OSError if it does not."""
        while self._hear() != (_RESET, stream):
            pass

    def send_raw(self, data: bytes) -> None:
        """Send bytes, whatever they mean."""
        self._write(data)

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _hear(self) -> tuple[int, int]:
        """Read a frame, and return its kind and its stream. Raises OSError if none comes."""
        head = self._read(9)
        kind, flags, stream = struct.unpack_from(">BBI", head, 3)
        payload = self._read(int.from_bytes(head[:3]))
        if kind == _WINDOW_UPDATE:
            self._windows[stream] = self._windows.get(stream, 0) + int.from_bytes(payload)
        elif kind == _SETTINGS and not flags & _ACK:
            for number, value in struct.iter_unpack(">HI", payload):
                if number == _INITIAL_WINDOW_SIZE:
                    self._change_windows(value)
        return kind, stream

    def _change_windows(self, initial_bytes: int) -> None:
        for stream in self._windows:
            if stream != _WHOLE:
                self._windows[stream] += initial_bytes - self._initial_window_bytes
        self._initial_window_bytes = initial_bytes

    def _read(self, size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            piece = self._socket.recv(size_bytes - len(data))
            if not piece:
                raise ConnectionResetError("the server has closed the connection")
            data += piece
        return data

    def _write(self, data: bytes) -> None:
        self._socket.sendall(data)


def _frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _field(name: str, value: str) -> bytes:
    """Return a header as HPACK has it, in plain text, and to be remembered by nobody."""
    texts = name.encode(), value.encode()
    return b"\0" + b"".join(bytes([len(text)]) + text for text in texts)
