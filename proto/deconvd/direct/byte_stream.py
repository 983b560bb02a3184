"""Byte streams: connections that carry bytes each way, with a deadline for whoever waits, and sockets as such."""

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
"""Up to this size a copy costs less than to tell the kernel of several places."""

_MAX_WAIT_S: Final = 24 * 60 * 60
"""For one operation: the system's timers do not reach as far as a deadline may."""

_MAX_SELECT_S: Final = 0.05
"""What is shorter is to be kept to the microsecond."""

_FD_SETSIZE: Final = 1024
"""FD_SETSIZE: descriptors from this number on are none of select's."""

_TCP_USER_TIMEOUT_S: Final = 20
"""How long the other host may take nothing, or give no sign, before a TCP connection is given up."""

_DRAIN_BUFFER_BYTES: Final = 32 << 10
"""What is thrown away at once by `end_gently`."""


class ByteStream(Protocol):
    """One end of a connection. One thread may read while another writes; anyone may call `shutdown`.

    Methods that wait raise ConnectionTimeoutError at the deadline, and ConnectionClosedError once the other end has
    closed the connection or it was cut.
    """

    def set_deadline(self, timeout_s: float | None) -> None:
        """Let reading and writing end so many seconds from now; None for no end."""

    def read_into(self, target: memoryview) -> int:
        """Set the begin of `target` to the next bytes: at least one. Return how many they are."""

    def write(self, *buffers: Buffer) -> None:
        """Send all bytes of the buffers."""

    def poll(self, timeout_s: float) -> bool:
        """Return whether there is something to read within so many seconds, if only the end.

        At the deadline it is False.
        """

    def wait(self) -> None:
        """Return once there is something to read, if only the end."""

    def shutdown(self) -> None:
        """Break the connection, for both ends: whoever reads or writes stops at once."""

    def half_close_and_drain(self, timeout_s: float) -> None:
        """Send nothing more, and throw away what comes until the other end closes it, or time is up."""

    def close(self) -> None:
        """Close it. Whoever reads or writes must have stopped."""


class SocketStream:
    """A stream socket as a byte stream.

    Attributes:
        blocked_since_s: Since when it has waited for the other end to send or to take anything, on the monotonic clock;
            infinity while it does not wait. Any thread may look.

    Args:
        connection: This object closes it. It is made non-blocking: where there is something to read, or room for
            what is written, that is one call of the system.
        stall_limit_s: As long as there is a deadline, the other end must send or take something within so many
            seconds, or whatever waits raises ConnectionTimeoutError.
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
        """The socket's."""
        return self._socket.fileno()

    def set_deadline(self, timeout_s: float | None) -> None:
        """See `ByteStream`."""
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s

    def read_into(self, target: memoryview) -> int:
        """See `ByteStream`."""
        count = self._transfer(self._socket.recv_into, target, self._is_readable)
        if not count:
            raise ConnectionClosedError("the other end has closed the line")
        return count

    def write(self, *buffers: Buffer) -> None:
        """See `ByteStream`. Few bytes are sent at once."""
        if len(buffers) > 1:
            if sum(map(len, buffers)) <= _MAX_JOINED_BYTES:
                buffers = (b"".join(buffers),)
            elif hasattr(
                self._socket, "sendmsg"
            ):  # several together, as far as the kernel takes them
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
        with suppress(OSError):  # it is broken already
            self._socket.shutdown(socket.SHUT_RDWR)

    def half_close_and_drain(self, timeout_s: float) -> None:
        """See `ByteStream`. A socket that is closed before it was read to its end would lose what was sent last."""
        self.set_deadline(timeout_s)
        rest = memoryview(bytearray(_DRAIN_BUFFER_BYTES))
        with suppress(OSError):  # it is broken, or takes too long
            self._socket.shutdown(socket.SHUT_WR)
            while self.read_into(rest):
                pass

    def close(self) -> None:
        """See `ByteStream`."""
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()  # without a warning, if its owner has dropped it

    def _transfer(
        self, move: Callable[[_T], int], what: _T, is_ready: Callable[[float], bool]
    ) -> int:
        """Read or write some bytes, once that is possible; return how many."""
        while True:
            if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                raise ConnectionTimeoutError("the deadline has passed")
            try:
                return move(what)
            except BlockingIOError:
                self._wait_until_ready(is_ready)
            except OSError as error:
                if error.errno is None:
                    raise  # not the system's: a signal handler's, a TimeoutError say
                raise ConnectionClosedError(f"the line broke: {error}") from None

    def _wait_until_ready(self, is_ready: Callable[[float], bool]) -> None:
        """Wait until the socket is ready."""
        self.blocked_since_s = began_s = time.monotonic()
        deadline_s = math.inf if self._deadline_s is None else self._deadline_s
        stalled_s = math.inf if self._deadline_s is None else began_s + self._stall_limit_s
        is_so = False
        try:
            while not is_so:
                remaining_s = min(deadline_s, stalled_s) - time.monotonic()
                if remaining_s <= 0:
                    raise ConnectionTimeoutError(
                        "the deadline has passed"
                        if deadline_s <= stalled_s
                        else f"the other end has sent and taken nothing for {self._stall_limit_s:g} s"
                    )
                is_so = is_ready(min(remaining_s, _MAX_WAIT_S))
        finally:
            self.blocked_since_s = math.inf


def _make_read_poller(connection: socket.socket) -> Callable[[float], bool]:
    """Return what tells whether anything comes on a socket within so many seconds."""
    descriptor = connection.fileno()

    def select_readable(timeout_s: float) -> bool:
        return bool(select.select([descriptor], [], [], timeout_s)[0])

    return _make_poller(descriptor, "POLLIN", select_readable)


def _make_write_poller(connection: socket.socket) -> Callable[[float], bool]:
    """Return what tells whether there is room for anything on a socket within so many seconds."""
    descriptor = connection.fileno()

    def select_writable(timeout_s: float) -> bool:
        return bool(select.select([], [descriptor], [], timeout_s)[1])

    return _make_poller(descriptor, "POLLOUT", select_writable)


def _make_poller(
    descriptor: int, event: str, by_select: Callable[[float], bool]
) -> Callable[[float], bool]:
    """Return what waits for an event of `select.poll`: by poll, where that is and does."""
    if not hasattr(select, "poll"):  # Windows
        return by_select
    poll = select.poll()
    poll.register(descriptor, getattr(select, event))

    def is_ready(timeout_s: float) -> bool:
        # poll is quicker and takes all descriptors, and counts in milliseconds
        if 0 < timeout_s < _MAX_SELECT_S and descriptor < _FD_SETSIZE:
            return by_select(timeout_s)
        return bool(poll.poll(timeout_s * 1e3))

    return is_ready


def _skip_bytes(buffers: Sequence[Buffer], count: int) -> tuple[Buffer, ...]:
    """Return what lies beyond so many bytes of the buffers."""
    rest: list[Buffer] = []
    for buffer in buffers:
        if count < len(buffer):
            rest.append(memoryview(buffer)[count:])
        count = max(count - len(buffer), 0)
    return tuple(rest)


def _set_tcp_options(connection: socket.socket) -> None:
    """Set a TCP connection to send at once, and to notice that the other host is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_USER_TIMEOUT": _TCP_USER_TIMEOUT_S * 1000,
        "TCP_KEEPIDLE": _TCP_USER_TIMEOUT_S // 2,
        "TCP_KEEPINTVL": _TCP_USER_TIMEOUT_S // 4,
        "TCP_KEEPCNT": 2,
    }
    for name, value in options.items():
        if hasattr(socket, name):  # not every system has each
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
