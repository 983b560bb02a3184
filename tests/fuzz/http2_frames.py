"""Frames of HTTP/2, as clients of gRPC send them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

from tests.fuzz.requests import REQUESTS, SERVICE

__all__ = ["authorized_call", "http2_frame", "http2_sequences", "read_answer"]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 2, 3, 4, 6, 7, 8
_CONTINUATION = 9
_END_STREAM = 1


def http2_frame(kind: int, payload: bytes, flags: int = 0, stream: int = 0) -> bytes:
    """Return a frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(text: bytes) -> bytes:
    """Return a string of HPACK without compression."""
    if len(text) < 127:
        return bytes([len(text)]) + text
    size, digits = len(text) - 127, [127]
    while size >= 128:
        digits.append(128 | size % 128)
        size //= 128
    return bytes([*digits, size]) + text


def _headers(path: str, *extra: tuple[str, str | bytes]) -> bytes:
    fields: list[tuple[str, str | bytes]] = [(":method", "POST"), (":scheme", "http")]
    fields += [(":path", path), (":authority", "fuzz"), ("te", "trailers")]
    fields += [("content-type", "application/grpc"), *extra]
    return b"".join(
        b"\0"
        + _literal(name.encode())
        + _literal(value if isinstance(value, bytes) else value.encode())
        for name, value in fields
    )


def authorized_call(values: Sequence[bytes]) -> bytes:
    """Return a call of GetServerInfo that carries these values as its authorization."""
    block = _headers(
        f"/{SERVICE.full_name}/GetServerInfo", *(("authorization", value) for value in values)
    )
    return b"".join(
        [
            _PREFACE,
            http2_frame(_SETTINGS, b""),
            http2_frame(_HEADERS, block, 4, 1),
            http2_frame(_DATA, bytes(5), _END_STREAM, 1),
        ]
    )


def read_answer(answer: bytes) -> tuple[bool, bool]:
    """Return whether a call has been answered by a message, and whether it has ended."""
    has_message = has_ended = False
    while len(answer) >= 9:
        size, kind, flags = int.from_bytes(answer[:3], "big"), answer[3], answer[4]
        has_message |= kind == _DATA and size > 0
        is_end = kind in (_DATA, _HEADERS) and bool(flags & _END_STREAM)
        has_ended |= is_end or kind in (_RESET, _GOAWAY)
        answer = answer[9 + size :]
    return has_message, has_ended


def http2_sequences() -> Iterator[list[bytes]]:
    """Yield what clients of gRPC send: a call of each RPC, and frames of each other kind."""
    begin = [_PREFACE, http2_frame(_SETTINGS, struct.pack(">HI", 4, 1 << 20))]
    for name, parts in REQUESTS.items():
        frames = [http2_frame(_HEADERS, _headers(f"/{SERVICE.full_name}/{name}"), 4, 1)]
        for part in parts:
            data = part.SerializeToString()
            frames.append(http2_frame(_DATA, struct.pack(">?I", False, len(data)) + data, 0, 1))
        yield [*begin, *frames, http2_frame(_DATA, b"", 1, 1)]
    extra = [("grpc-timeout", "1S"), ("grpc-encoding", "gzip"), ("authorization", "Bearer dcd_x")]
    block = _headers("/grpc.health.v1.Health/Check", *extra)
    yield [
        *begin,
        http2_frame(_HEADERS, block[:20], 0, 1),
        http2_frame(_CONTINUATION, block[20:], 4, 1),
        http2_frame(_DATA, struct.pack(">?I", False, 0), 1, 1),
        http2_frame(_PING, bytes(8)),
        http2_frame(_PRIORITY, bytes(5), 0, 1),
        http2_frame(_WINDOW, struct.pack(">I", 1 << 16)),
        http2_frame(_RESET, struct.pack(">I", 8), 0, 1),
        http2_frame(_GOAWAY, bytes(8)),
    ]
