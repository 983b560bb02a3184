"""Ways by which direct calls can reach a server: how a line is opened. See `deconvd.direct.protocol`."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.events import Hello
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.protocol import DirectProtocol, Role
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_options import unix_path
from deconvd_client.transports.side_sockets import find_call_sockets
from deconvd_client.transports.targets import host_of, resolver_of

__all__ = ["Connector", "InfoFetcher", "TcpConnector", "UnixConnector", "connector_for"]

InfoFetcher: TypeAlias = Callable[[], pb.GetServerInfoResponse]
"""Asks a server what it is."""

_UNIX_CONNECT_TIMEOUT_S: Final = 0.5
_TCP_CONNECT_TIMEOUT_S: Final = 5.0
"""How long a server may take to let a line be opened; calls go by gRPC then."""

_MIN_TIMEOUT_S: Final = 1e-3
"""What sockets take for a time-out: 0 would mean none."""

_SEND_BUFFER_BYTES: Final = 1 << 20
"""What a Unix socket may hold that is on its way, if the system allows so much."""

_TIMEVAL: Final = struct.Struct("@ll")


class _DirectAddress(NamedTuple):
    """Where a server takes direct calls.

    Attributes:
        path: Its socket's.
        instance: Its id.
    """

    path: str
    instance: bytes


@dataclass(slots=True)
class UnixConnector:
    """By a Unix socket beside the one for gRPC, on this host: the server tells which.

    Attributes:
        path: That of the socket for gRPC.
    """

    path: str
    _address: _DirectAddress | None = field(default=None, init=False, compare=False)
    """Where lines are opened, once one was."""

    @property
    def is_address_known(self) -> bool:
        """Whether the server need not be asked."""
        return self._address is not None

    def connect(self, ask: InfoFetcher, timeout_s: float) -> FrameStream:
        """Return a new line, to where the last one went if that is known; if not, the server is asked.

        Raises:
            OSError: The server opens none in time.
            DeconvdError: What it said when it was asked for its socket.
        """
        place = self._address or self._find_address(ask())
        try:
            line = self._connect_to(
                place, min(max(timeout_s, _MIN_TIMEOUT_S), _UNIX_CONNECT_TIMEOUT_S)
            )
        except OSError:
            self._address = None
            raise
        self._address = place
        return line

    def _find_address(self, info: pb.GetServerInfoResponse) -> _DirectAddress:
        paths = find_call_sockets(info, self.path)
        if not paths:
            raise ConnectionRefusedError("the server takes no direct calls beside its socket")
        return _DirectAddress(paths[0], bytes.fromhex(info.instance_id))

    def _connect_to(self, place: _DirectAddress, timeout_s: float) -> FrameStream:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            # a server that is stopped lets callers wait once it has many; Python's own time-out
            # would not wait at all
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))
            connection.connect(place.path)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(0))
        except BaseException:
            connection.close()
            raise
        return _shake_hands(connection, place.instance, timeout_s)


@dataclass(frozen=True, slots=True)
class TcpConnector:
    """By a TCP port that the server tells, on the host of its target.

    Attributes:
        host: Name or address.
    """

    host: str
    is_address_known = False

    def connect(self, ask: InfoFetcher, timeout_s: float) -> FrameStream:
        """Return a new line.

        Raises:
            OSError: The server opens none.
            DeconvdError: What it said when it was asked for its port.
        """
        info = ask()
        if not info.direct_port:
            raise ConnectionRefusedError("the server takes no direct calls over TCP")
        timeout_s = min(max(timeout_s, _MIN_TIMEOUT_S), _TCP_CONNECT_TIMEOUT_S)
        connection = socket.create_connection((self.host, info.direct_port), timeout_s)
        return _shake_hands(connection, bytes.fromhex(info.instance_id), timeout_s)


def _shake_hands(connection: socket.socket, instance: bytes, timeout_s: float) -> FrameStream:
    """Return a line to a server that has said that it is the one. Raises ConnectionBrokenError otherwise."""
    line = FrameStream(SocketStream(connection), DirectProtocol(Role.CLIENT, instance))
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


Connector: TypeAlias = UnixConnector | TcpConnector


def connector_for(target: str) -> Connector | None:
    """Return how direct calls can reach a target of gRPC's; None if they cannot."""
    path = unix_path(target)
    if path:
        return UnixConnector(path) if hasattr(socket, "AF_UNIX") else None
    host = host_of(target)
    return TcpConnector(host) if host and not resolver_of(target) else None
