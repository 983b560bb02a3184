"""Byte streams with deadlines: the interface that direct connections need, and its implementation with sockets."""

from __future__ import annotations

import math
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol

from deconvd.direct.connection_errors import ConnectionClosedError, ConnectionTimeoutError
from deconvd.wire.codec import Buffer

__all__ = ["ByteStream", "SocketStream", "receive_flags", "timeval"]

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

_MIN_BULK_BYTES: Final = 256 << 10
"""From this size on, bytes are moved by few long system calls, which wait in the kernel for the peer."""

_KERNEL_WAIT_S: Final = 0.1
"""How long such a system call waits at most: deadlines, and a peer that has stalled, are noticed between two."""

_NO_WAIT: Final[int] = getattr(socket, "MSG_DONTWAIT", 0)
"""Flag of a system call that does not wait. 0 on Windows, where sockets are non-blocking instead."""

_WAIT_FOR_ALL: Final[int] = socket.MSG_WAITALL if _NO_WAIT else 0

_NO_LINGER: Final = struct.pack("@ii", 1, 0)
"""Value of SO_LINGER: a socket that is closed discards what it has not sent."""

_TIMEVAL: Final = struct.Struct("@ll")


class ByteStream(Protocol):
    """One end of a connection. One thread may read while another writes, and any thread may call `shutdown` or `abort`.

    Methods that wait raise ConnectionTimeoutError at the deadline, and ConnectionClosedError once the connection has
    ended.
    """

    def set_deadline(self, timeout_s: float | None) -> None:
        """Set the deadline of reading and writing to `timeout_s` seconds from now. None: no deadline."""

    def read_into(self, target: memoryview) -> int:
        """Read at least one byte into the start of `target`. Return the number of bytes read."""

    def fill(self, target: memoryview) -> None:
        """Read all of `target`."""

    def write(self, *buffers: Buffer) -> None:
        """Send all bytes of all buffers."""

    def poll(self, timeout_s: float) -> bool:
        """Return whether data, or the end of the stream, arrives within `timeout_s` seconds. False at the deadline."""

    def wait(self) -> None:
        """Return when data, or the end of the stream, has arrived."""

    def shutdown(self) -> None:
        """End the connection for both ends. Threads that read or write stop at once."""

    def abort(self) -> None:
        """Do as `shutdown`, and let `close` discard unsent data, so that also a peer that does not read hears of it."""

    def half_close_and_drain(self, timeout_s: float) -> None:
        """Stop sending, then read and discard data until the peer closes the connection or the time is up."""

    def close(self) -> None:
        """Release the connection. No thread may read or write any more."""


class _OwnedSocket(socket.socket):
    """A socket that its stream owns: it is closed without a ResourceWarning when the stream has been dropped.

    The stream's own finalizer would come too late where both are parts of a cycle: nobody says which is the first.
    """

    __slots__ = ()

    def __del__(self) -> None:
        self.close()


class SocketStream:
    """A stream socket as a byte stream.

    Attributes:
        blocked_since_s: When the current wait for the peer began, on the monotonic clock. Infinity while nothing
            waits. Any thread may read it.

    Args:
        connection: The socket, which this object owns and closes. It becomes blocking, with short timeouts: the kernel
            waits for the next bytes, or moves megabytes, in one system call. Each further one would make the thread
            wait for the interpreter's lock. Small writes, and all calls near the deadline, do not wait in the kernel.
        stall_limit_s: If there is a deadline and the peer neither sends nor accepts anything for this long,
            the waiting method raises ConnectionTimeoutError.
    """

    def __init__(self, connection: socket.socket, *, stall_limit_s: float = math.inf) -> None:
        self.blocked_since_s = math.inf
        connection.__class__ = _OwnedSocket
        self._socket = connection
        self._stall_limit_s = stall_limit_s
        self._deadline_s: float | None = None
        self._is_readable, self._is_writable = (
            _make_read_poller(connection),
            _make_write_poller(connection),
        )
        connection.setblocking(bool(_NO_WAIT))
        if _NO_WAIT:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval(_KERNEL_WAIT_S))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(_KERNEL_WAIT_S))
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
        flags = 0 if self._may_wait() else _NO_WAIT
        count = self._transfer(self._socket.recv_into, (target, 0, flags), self._is_readable)
        if not count:
            raise ConnectionClosedError("the peer has closed the connection")
        return count

    def fill(self, target: memoryview) -> None:
        """See `ByteStream`."""
        while target:
            flags = _WAIT_FOR_ALL if self._may_wait_for(len(target)) else _NO_WAIT
            count = self._transfer(self._socket.recv_into, (target, 0, flags), self._is_readable)
            if not count:
                raise ConnectionClosedError("the peer has closed the connection")
            target = target[count:]

    def write(self, *buffers: Buffer) -> None:
        """See `ByteStream`. Small buffers are joined, and sent with one system call."""
        if len(buffers) > 1:
            size_bytes = sum(map(len, buffers))
            if size_bytes <= _MAX_JOINED_BYTES:
                buffers = (b"".join(buffers),)
            elif hasattr(self._socket, "sendmsg"):  # not on Windows
                flags = 0 if self._may_wait_for(size_bytes) else _NO_WAIT
                sent = self._transfer(self._socket.sendmsg, (buffers, (), flags), self._is_writable)
                buffers = _skip_bytes(buffers, sent)
        for buffer in buffers:
            rest = buffer
            while rest:
                flags = 0 if self._may_wait_for(len(rest)) else _NO_WAIT
                sent = self._transfer(self._socket.send, (rest, flags), self._is_writable)
                rest = memoryview(rest)[sent:]

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

    def abort(self) -> None:
        """See `ByteStream`. Over TCP, `close` then sends a reset instead of an end behind all that is buffered."""
        with suppress(OSError):  # the connection has ended already
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.shutdown()

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

    def _may_wait(self) -> bool:
        """Return whether a system call may wait in the kernel: the deadline is not near."""
        return self._deadline_s is None or time.monotonic() < self._deadline_s - _KERNEL_WAIT_S

    def _may_wait_for(self, size_bytes: int) -> bool:
        """Return whether a system call may wait in the kernel until it has moved this much."""
        return size_bytes >= _MIN_BULK_BYTES and self._may_wait()

    def _transfer(
        self,
        move: Callable[..., int],
        arguments: tuple[Any, ...],
        is_ready: Callable[[float], bool],
    ) -> int:
        """Wait until the socket is ready, read or write with `move`, and return the number of bytes."""
        while True:
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                raise ConnectionTimeoutError("the deadline has passed")
            try:
                return move(*arguments)
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


def receive_flags(*, may_wait: bool, for_all: bool = False) -> int:
    """Return the flags of a system call: whether it may wait, and for all bytes that it is asked for."""
    return (_WAIT_FOR_ALL if for_all else 0) if may_wait else _NO_WAIT


def timeval(seconds: float) -> bytes:
    """Return a time as the socket options SO_RCVTIMEO and SO_SNDTIMEO have it. 0 means for ever."""
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))


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
