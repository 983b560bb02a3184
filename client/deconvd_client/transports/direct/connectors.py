"""Ways by which direct calls can reach a server: how a line is opened. See `deconvd.direct.protocol`."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.events import Hello
from deconvd.direct.frame_stream import Line
from deconvd.direct.protocol import DirectProtocol, Role
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_options import unix_path
from deconvd_client.transports.side_sockets import calls_sockets
from deconvd_client.transports.targets import host_of, resolver_of

__all__ = ["Ask", "TcpWay", "UnixWay", "Way", "way_to"]

Ask: TypeAlias = Callable[[], pb.GetServerInfoResponse]
"""Asks a server what it is."""

_UNIX_S: Final = 0.5
_TCP_S: Final = 5.0
"""How long a server may take to let a line be opened; calls go by gRPC then."""

_LEAST_S: Final = 1e-3
"""What sockets take for a time-out: 0 would mean none."""

_BUFFER_BYTES: Final = 1 << 20
"""What a Unix socket may hold that is on its way, if the system allows so much."""

_TIMEVAL: Final = struct.Struct("@ll")


class _Place(NamedTuple):
    """Where a server takes direct calls.

    Attributes:
        path: Its socket's.
        instance: Its id.
    """

    path: str
    instance: bytes


@dataclass(slots=True)
class UnixWay:
    """By a Unix socket beside the one for gRPC, on this host: the server tells which.

    Attributes:
        path: That of the socket for gRPC.
    """

    path: str
    _known: _Place | None = field(default=None, init=False, compare=False)
    """Where lines are opened, once one was."""

    @property
    def is_quick(self) -> bool:
        """Whether the server need not be asked."""
        return self._known is not None

    def open(self, ask: Ask, timeout_s: float) -> Line:
        """Return a new line, to where the last one went if that is known; if not, the server is asked.

        Raises:
            OSError: The server opens none in time.
            DeconvdError: What it said when it was asked for its socket.
        """
        place = self._known or self._place(ask())
        try:
            line = self._open_at(place, min(max(timeout_s, _LEAST_S), _UNIX_S))
        except OSError:
            self._known = None
            raise
        self._known = place
        return line

    def _place(self, info: pb.GetServerInfoResponse) -> _Place:
        paths = calls_sockets(info, self.path)
        if not paths:
            raise ConnectionRefusedError("the server takes no direct calls beside its socket")
        return _Place(paths[0], bytes.fromhex(info.instance_id))

    def _open_at(self, place: _Place, timeout_s: float) -> Line:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            # a server that is stopped lets callers wait once it has many; Python's own time-out
            # would not wait at all
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
            connection.connect(place.path)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
        except BaseException:
            connection.close()
            raise
        return _greeted(connection, place.instance, timeout_s)


@dataclass(frozen=True, slots=True)
class TcpWay:
    """By a TCP port that the server tells, on the host of its target.

    Attributes:
        host: Name or address.
    """

    host: str
    is_quick = False

    def open(self, ask: Ask, timeout_s: float) -> Line:
        """Return a new line.

        Raises:
            OSError: The server opens none.
            DeconvdError: What it said when it was asked for its port.
        """
        info = ask()
        if not info.direct_port:
            raise ConnectionRefusedError("the server takes no direct calls over TCP")
        timeout_s = min(max(timeout_s, _LEAST_S), _TCP_S)
        connection = socket.create_connection((self.host, info.direct_port), timeout_s)
        return _greeted(connection, bytes.fromhex(info.instance_id), timeout_s)


def _greeted(connection: socket.socket, instance: bytes, timeout_s: float) -> Line:
    """Return a line to a server that has said that it is the one. Raises LineBrokenError otherwise."""
    line = Line(SocketStream(connection), DirectProtocol(Role.CLIENT, instance))
    line.set_deadline(timeout_s)
    try:
        line.send(Hello(instance))
        line.next_event()
    except BaseException:
        line.close()
        raise
    return line


def _timeval(seconds: float) -> bytes:
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))


Way: TypeAlias = UnixWay | TcpWay


def way_to(target: str) -> Way | None:
    """Return how direct calls can reach a target of gRPC's; None if they cannot."""
    path = unix_path(target)
    if path:
        return UnixWay(path) if hasattr(socket, "AF_UNIX") else None
    host = host_of(target)
    return TcpWay(host) if host and not resolver_of(target) else None
