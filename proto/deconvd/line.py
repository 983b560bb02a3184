"""A line: a socket between a client and a server that carries frames, without gRPC.

A frame is a kind (1 byte), 3 zero bytes, the length of its payload (4 bytes, little-endian) and the payload. What they
mean is written in `deconvd.direct`. Payloads are sent from where they lie and received where they are to be.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum
from typing import Final, TypeVar

import numpy as np
from google.protobuf.message import Message

from deconvd.codec import Buffer
from deconvd.parts import Bytes, Part

__all__ = [
    "FRAME_HEAD_BYTES",
    "MAX_MESSAGE_BYTES",
    "FrameKind",
    "Line",
    "LineBrokenError",
    "LineTimeoutError",
]

_T = TypeVar("_T")

MAX_MESSAGE_BYTES: Final = 128 << 10
"""The largest payload that is no elements: what either end must hold for each line."""

_HEAD: Final = struct.Struct("<B3xI")
FRAME_HEAD_BYTES: Final = _HEAD.size

_FRAME_BYTES: Final = 16 << 20
"""Elements in a frame, at most: enough that a frame costs nothing beside its bytes."""

_BUFFER_BYTES: Final = 32 << 10
"""What is read ahead: whole brief calls, and little of elements that belong elsewhere."""

_JOINED_BYTES: Final = 16 << 10
"""Up to this size a copy costs less than to tell the kernel of several places."""

_LONGEST_S: Final = 24 * 60 * 60
"""For one operation: the system's timers do not reach as far as a deadline may."""

_FINE_S: Final = 0.05
"""What is shorter is to be kept to the microsecond."""

_SELECTABLE_COUNT: Final = 1024
"""FD_SETSIZE: descriptors from this number on are none of select's."""

_DEAD_AFTER_S: Final = 20
"""How long the other host may take nothing, or give no sign, before a TCP line is given up."""


class FrameKind(IntEnum):
    """What a frame carries."""

    HELLO = 1
    CALL = 2
    MESSAGE = 3
    ELEMENTS = 4
    MISSING_ELEMENTS = 5
    END = 6
    FAILED = 7
    WRITTEN = 8
    ANSWER = 9


_KINDS: Final = {kind.value: kind for kind in FrameKind}


class LineBrokenError(ConnectionError):
    """The other end has closed the line, or it was cut, or what came makes no sense."""


class LineTimeoutError(LineBrokenError):
    """The deadline has passed, and the line is somewhere in the middle of things."""


class Line:
    """One end of a line. One thread may send while another receives; anyone may `shut`.

    Sending and receiving raise LineBrokenError when the line is of no more use: LineTimeoutError at
    the deadline.

    Args:
        connection: The line closes it. It is made non-blocking: where there is something to receive, or room for
            what is sent, that is one call of the system.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._deadline_s: float | None = None
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._begin = self._end = 0  # of what was read ahead
        self._is_readable, self._is_writable = _readable(connection), _writable(connection)
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            _tune(connection)

    @property
    def descriptor(self) -> int:
        """The socket's."""
        return self._socket.fileno()

    def set_deadline(self, timeout_s: float | None) -> None:
        """Let sending and receiving end so many seconds from now; None for no end."""
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

    def send(self, *frames: tuple[FrameKind, Buffer]) -> None:
        """Send frames."""
        buffers: list[Buffer] = []
        for kind, payload in frames:
            buffers += (_HEAD.pack(kind, len(payload)), payload)
        self._send(buffers)

    def send_part(self, part: Part) -> None:
        """Send a part of a stream."""
        if isinstance(part, Message):
            self.send((FrameKind.MESSAGE, part.SerializeToString()))
            return
        kind = FrameKind.MISSING_ELEMENTS if part.is_missing else FrameKind.ELEMENTS
        for piece in part.pieces(_FRAME_BYTES):
            self.send((kind, piece.data))

    def receive(self) -> tuple[FrameKind, int]:
        """Return the kind of the next frame, and its payload's size in bytes: that is to be read next."""
        self._have(FRAME_HEAD_BYTES)
        number, size_bytes = _HEAD.unpack_from(self._buffer, self._begin)
        self._begin += FRAME_HEAD_BYTES
        kind = _KINDS.get(number)
        if kind is None:
            raise LineBrokenError(f"a frame of the unknown kind {number}")
        return kind, size_bytes

    def receive_payload(self, size_bytes: int) -> bytes:
        """Return the payload of a frame that has no elements."""
        if size_bytes > MAX_MESSAGE_BYTES:
            raise LineBrokenError(f"a frame of {size_bytes} bytes, and {MAX_MESSAGE_BYTES} may be")
        return self.take(size_bytes)

    def take(self, size_bytes: int) -> bytes:
        """Return the next bytes."""
        if size_bytes > _BUFFER_BYTES:
            target = np.empty(size_bytes, np.uint8)
            self.read_into(target)
            return target.tobytes()
        self._have(size_bytes)
        begin = self._begin
        self._begin += size_bytes
        return bytes(self._buffer[begin : self._begin])

    def read_into(self, target: Bytes) -> None:
        """Set `target` to the next bytes."""
        filled = min(len(target), self._end - self._begin)
        target[:filled] = self._buffer[self._begin : self._begin + filled]
        self._begin += filled
        while filled < len(target):
            self._await(self._is_readable)
            filled += self._received(target[filled:].data)

    def has_come(self, size_bytes: int, timeout_s: float) -> bool:
        """Return whether so many bytes, few enough to be read ahead, can be taken within so many seconds.

        At the deadline it is False.
        """
        until_s = time.monotonic() + min(timeout_s, _LONGEST_S)
        if self._deadline_s is not None:
            until_s = min(until_s, self._deadline_s)
        while self._end - self._begin < size_bytes:
            if not self._is_readable(max(until_s - time.monotonic(), 0)):
                return False
            self._read_ahead()
        return True

    def next_kind(self) -> FrameKind | None:
        """Return the kind of the next frame, which is not taken; None if it has not begun to come, or is unknown."""
        if not self.has_come(FRAME_HEAD_BYTES, 0):
            return None
        return _KINDS.get(self._buffer[self._begin])

    def wait(self) -> None:
        """Wait until something comes, if nothing has been read ahead."""
        if self._begin == self._end:
            self._await(self._is_readable)

    def is_quiet(self) -> bool:
        """Return whether nothing has come that was not asked for, not even the line's end."""
        return self._begin == self._end and not self._is_readable(0)

    def shut(self) -> None:
        """Break the line, for both ends: whoever sends or receives stops at once."""
        with suppress(OSError):  # it is broken already
            self._socket.shutdown(socket.SHUT_RDWR)

    def end_gently(self, timeout_s: float) -> None:
        """Send nothing more, and throw away what comes until the other end closes it, or time is up.

        A socket that is closed before it was read to its end would lose what was sent last.
        """
        self.set_deadline(timeout_s)
        with suppress(OSError):  # it is broken, or takes too long
            self._socket.shutdown(socket.SHUT_WR)
            while self._received(self._buffer):
                pass

    def close(self) -> None:
        """Close it. Whoever sends or receives must have stopped."""
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()  # without a warning, if its owner has dropped it

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _have(self, size_bytes: int) -> None:
        """Read ahead until there are so many bytes."""
        while self._end - self._begin < size_bytes:
            self._read_ahead()

    def _read_ahead(self) -> None:
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._end == _BUFFER_BYTES or self._begin > _BUFFER_BYTES // 2:
            rest = self._end - self._begin
            self._buffer[:rest] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, rest
        self._end += self._received(self._buffer[self._end :])

    def _received(self, target: memoryview) -> int:
        """Receive what there is, once there is something; return how many bytes."""
        count = self._moved(self._socket.recv_into, target, self._is_readable)
        if not count:
            raise LineBrokenError("the other end has closed the line")
        return count

    def _send(self, buffers: list[Buffer]) -> None:
        size_bytes = sum(map(len, buffers))
        if size_bytes <= _JOINED_BYTES:
            self._send_all(b"".join(buffers))
            return
        if hasattr(self._socket, "sendmsg"):  # several together, as far as the kernel takes them
            buffers = _after(buffers, self._moved(self._socket.sendmsg, buffers, self._is_writable))
        for buffer in buffers:
            self._send_all(buffer)

    def _send_all(self, buffer: Buffer) -> None:
        sent = self._moved(self._socket.send, buffer, self._is_writable)
        while sent < len(buffer):
            self._await(self._is_writable)
            rest = memoryview(buffer)[sent:]
            sent += self._moved(self._socket.send, rest, self._is_writable)

    def _moved(self, move: Callable[[_T], int], what: _T, is_ready: Callable[[float], bool]) -> int:
        """Send or receive some bytes, once that is possible; return how many."""
        while True:
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                raise LineTimeoutError("the deadline has passed")
            try:
                return move(what)
            except BlockingIOError:
                self._await(is_ready)
            except OSError as error:
                if error.errno is None:
                    raise  # not the system's: a signal handler's, a TimeoutError say
                raise LineBrokenError(f"the line broke: {error}") from None

    def _await(self, is_ready: Callable[[float], bool]) -> None:
        """Wait until the socket is ready."""
        is_so = False
        while not is_so:
            remaining_s: float = _LONGEST_S
            if self._deadline_s is not None:
                remaining_s = min(self._deadline_s - time.monotonic(), _LONGEST_S)
                if remaining_s <= 0:
                    raise LineTimeoutError("the deadline has passed")
            is_so = is_ready(remaining_s)


def _readable(connection: socket.socket) -> Callable[[float], bool]:
    """Return what tells whether anything comes on a socket within so many seconds."""
    descriptor = connection.fileno()

    def by_select(timeout_s: float) -> bool:
        return bool(select.select([descriptor], [], [], timeout_s)[0])

    return _by_poll(descriptor, "POLLIN", by_select)


def _writable(connection: socket.socket) -> Callable[[float], bool]:
    """Return what tells whether there is room for anything on a socket within so many seconds."""
    descriptor = connection.fileno()

    def by_select(timeout_s: float) -> bool:
        return bool(select.select([], [descriptor], [], timeout_s)[1])

    return _by_poll(descriptor, "POLLOUT", by_select)


def _by_poll(
    descriptor: int, event: str, by_select: Callable[[float], bool]
) -> Callable[[float], bool]:
    """Return what waits for an event of `select.poll`: by poll, where that is and does."""
    if not hasattr(select, "poll"):  # Windows
        return by_select
    poll = select.poll()
    poll.register(descriptor, getattr(select, event))

    def is_ready(timeout_s: float) -> bool:
        # poll is quicker and takes all descriptors, and counts in milliseconds
        if 0 < timeout_s < _FINE_S and descriptor < _SELECTABLE_COUNT:
            return by_select(timeout_s)
        return bool(poll.poll(timeout_s * 1e3))

    return is_ready


def _after(buffers: list[Buffer], count: int) -> list[Buffer]:
    """Return what lies beyond so many bytes of the buffers."""
    rest: list[Buffer] = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(memoryview(buffer)[count:])
        count = max(count - len(buffer), 0)
    return rest


def _tune(connection: socket.socket) -> None:
    """Set a TCP connection to send at once, and to notice that the other host is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_USER_TIMEOUT": _DEAD_AFTER_S * 1000,
        "TCP_KEEPIDLE": _DEAD_AFTER_S // 2,
        "TCP_KEEPINTVL": _DEAD_AFTER_S // 4,
        "TCP_KEEPCNT": 2,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has each
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
