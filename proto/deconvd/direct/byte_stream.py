"""Byte streams with deadlines: the interface that direct connections need, and its implementation with sockets."""

from __future__ import annotations

import math
import select
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol, TypeVar

from deconvd.direct.connection_errors import ConnectionClosedError, ConnectionTimeoutError
from deconvd.wire.codec import Buffer

__all__ = ["ByteStream", "SocketStream"]

_T = TypeVar("_T")

_MAX_JOINED_BYTES: Final = 16 << 10
"""Up to this size, joining buffers into one costs less than passing several buffers to the kernel."""

_MAX_WAIT_S: Final = 24 * 60 * 60
"""Longest single wait. The system's timers do not reach as far as a deadline may."""

_MAX_SELECT_S: Final = 0.05
"""Shorter waits use select, which counts in microseconds; poll counts in milliseconds."""

_FD_SETSIZE: Final = 1024
"""The C library's FD_SETSIZE: select cannot wait for descriptors from this number on."""

_TCP_USER_TIMEOUT_S: Final = 20
"""A TCP connection is given up after the peer's host has acknowledged nothing for this long."""

_DRAIN_BUFFER_BYTES: Final = 32 << 10
"""Size of the buffer into which `half_close_and_drain` reads."""


class ByteStream(Protocol):
    """One end of a connection. One thread may read while another writes, and any thread may call `shutdown`.

    Methods that wait raise ConnectionTimeoutError at the deadline, and ConnectionClosedError once the connection has
    ended.
    """

    def set_deadline(self, timeout_s: float | None) -> None:
        """Set the deadline of reading and writing to `timeout_s` seconds from now. None: no deadline."""

    def read_into(self, target: memoryview) -> int:
        """Read at least one byte into the start of `target`. Return the number of bytes read."""

    def write(self, *buffers: Buffer) -> None:
        """Send all bytes of all buffers."""

    def poll(self, timeout_s: float) -> bool:
        """Return whether data, or the end of the stream, arrives within `timeout_s` seconds. False at the deadline."""

    def wait(self) -> None:
        """Return when data, or the end of the stream, has arrived."""

    def shutdown(self) -> None:
        """End the connection for both ends. Threads that read or write stop at once."""

    def half_close_and_drain(self, timeout_s: float) -> None:
        """Stop sending, then read and discard data until the peer closes the connection or the time is up."""

    def close(self) -> None:
        """Release the connection. No thread may read or write any more."""


class SocketStream:
    """A stream socket as a byte stream.

    Attributes:
        blocked_since_s: When the current wait for the peer began, on the monotonic clock. Infinity while nothing
            waits. Any thread may read it.

    Args:
        connection: The socket, which this object owns and closes. It becomes non-blocking: a read or write that need
            not wait is then a single system call.
        stall_limit_s: If there is a deadline and the peer neither sends nor accepts anything for this long,
            the waiting method raises ConnectionTimeoutError.
    """

    def __init__(self, connection: socket.socket, *, stall_limit_s: float = math.inf) -> None:
        self.blocked_since_s = math.inf
        self._socket = connection
        self._stall_limit_s = stall_limit_s
        self._deadline_s: float | None = None
        self._is_readable, self._is_writable = (
            _make_read_poller(connection),
            _make_write_poller(connection),
        )
        connection.setblocking(False)
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            _set_tcp_options(connection)

    @property
    def descriptor(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    def set_deadline(self, timeout_s: float | None) -> None:
        """See `ByteStream`."""
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

    def read_into(self, target: memoryview) -> int:
        """See `ByteStream`."""
        count = self._transfer(self._socket.recv_into, target, self._is_readable)
        if not count:
            raise ConnectionClosedError("the peer has closed the connection")
        return count

    def write(self, *buffers: Buffer) -> None:
        """See `ByteStream`. Small buffers are joined, and sent with one system call."""
        if len(buffers) > 1:
            if sum(map(len, buffers)) <= _MAX_JOINED_BYTES:
                buffers = (b"".join(buffers),)
            elif hasattr(self._socket, "sendmsg"):  # not on Windows
                buffers = _skip_bytes(
                    buffers, self._transfer(self._socket.sendmsg, buffers, self._is_writable)
                )
        for buffer in buffers:
            sent = self._transfer(self._socket.send, buffer, self._is_writable)
            while sent < len(buffer):
                self._wait_until_ready(self._is_writable)
                rest = memoryview(buffer)[sent:]
                sent += self._transfer(self._socket.send, rest, self._is_writable)

    def poll(self, timeout_s: float) -> bool:
        """See `ByteStream`."""
        if timeout_s > 0 and self._deadline_s is not None:
            timeout_s = min(timeout_s, self._deadline_s - time.monotonic())
        return self._is_readable(min(timeout_s, _MAX_WAIT_S) if timeout_s > 0 else 0)

    def wait(self) -> None:
        """See `ByteStream`."""
        self._wait_until_ready(self._is_readable)

    def shutdown(self) -> None:
        """See `ByteStream`."""
        with suppress(OSError):  # the connection has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def half_close_and_drain(self, timeout_s: float) -> None:
        """See `ByteStream`.

        Closing a socket that still has unread data resets the connection, and the peer then loses the last bytes sent.
        """
        self.set_deadline(timeout_s)
        rest = memoryview(bytearray(_DRAIN_BUFFER_BYTES))
        with suppress(OSError):  # the connection has ended, or the time is up
            self._socket.shutdown(socket.SHUT_WR)
            while self.read_into(rest):
                pass

    def close(self) -> None:
        """See `ByteStream`."""
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()  # avoids the ResourceWarning if the owner dropped this object without closing it

    def _transfer(
        self, move: Callable[[_T], int], what: _T, is_ready: Callable[[float], bool]
    ) -> int:
        """Wait until the socket is ready, read or write with `move`, and return the number of bytes."""
        while True:
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                raise ConnectionTimeoutError("the deadline has passed")
            try:
                return move(what)
            except BlockingIOError:
                self._wait_until_ready(is_ready)
            except OSError as error:
                if error.errno is None:
                    raise  # raised by a signal handler, for example a TimeoutError
                raise ConnectionClosedError(f"the connection broke: {error}") from None

    def _wait_until_ready(self, is_ready: Callable[[float], bool]) -> None:
        """Wait until the socket is ready, the deadline passes, or the peer has stalled for too long."""
        self.blocked_since_s = began_s = time.monotonic()
        deadline_s = math.inf if self._deadline_s is None else self._deadline_s
        stalled_s = math.inf if self._deadline_s is None else began_s + self._stall_limit_s
        has_become_ready = False
        try:
            while not has_become_ready:
                remaining_s = min(deadline_s, stalled_s) - time.monotonic()
                if remaining_s <= 0:
                    raise ConnectionTimeoutError(
                        "the deadline has passed"
                        if deadline_s <= stalled_s
                        else f"the peer has sent and accepted nothing for {self._stall_limit_s:g} s"
                    )
                has_become_ready = is_ready(min(remaining_s, _MAX_WAIT_S))
        finally:
            self.blocked_since_s = math.inf


def _make_read_poller(connection: socket.socket) -> Callable[[float], bool]:
    """Return a function that waits, for a number of seconds, until a socket is readable."""
    descriptor = connection.fileno()

    def select_readable(timeout_s: float) -> bool:
        return bool(select.select([descriptor], [], [], timeout_s)[0])

    return _make_poller(descriptor, "POLLIN", select_readable)


def _make_write_poller(connection: socket.socket) -> Callable[[float], bool]:
    """Return a function that waits, for a number of seconds, until a socket is writable."""
    descriptor = connection.fileno()

    def select_writable(timeout_s: float) -> bool:
        return bool(select.select([], [descriptor], [], timeout_s)[1])

    return _make_poller(descriptor, "POLLOUT", select_writable)


def _make_poller(
    descriptor: int, event: str, by_select: Callable[[float], bool]
) -> Callable[[float], bool]:
    """Return a function that waits for a poll event.

    It uses `select.poll` where the system has it, else `by_select`.
    """
    if not hasattr(select, "poll"):  # Windows
        return by_select
    poll = select.poll()
    poll.register(descriptor, getattr(select, event))

    def is_ready(timeout_s: float) -> bool:
        # poll is faster and has no limit on descriptors, but cannot wait for less than a millisecond
        if 0 < timeout_s < _MAX_SELECT_S and descriptor < _FD_SETSIZE:
            return by_select(timeout_s)
        return bool(poll.poll(timeout_s * 1e3))

    return is_ready


def _skip_bytes(buffers: Sequence[Buffer], count: int) -> tuple[Buffer, ...]:
    """Return the buffers without their first `count` bytes."""
    rest: list[Buffer] = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(memoryview(buffer)[count:])
        count = max(count - len(buffer), 0)
    return tuple(rest)


def _set_tcp_options(connection: socket.socket) -> None:
    """Make a TCP connection send small writes at once, and detect that the peer's host is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_USER_TIMEOUT": _TCP_USER_TIMEOUT_S * 1000,
        "TCP_KEEPIDLE": _TCP_USER_TIMEOUT_S // 2,
        "TCP_KEEPINTVL": _TCP_USER_TIMEOUT_S // 4,
        "TCP_KEEPCNT": 2,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
