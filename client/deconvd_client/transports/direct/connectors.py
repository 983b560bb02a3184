"""Connectors: they open direct connections, by a Unix socket or by TCP. See `deconvd.direct.protocol`."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeAlias

from deconvd.direct.byte_stream import SocketStream, timeval
from deconvd.direct.events import Hello
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.protocol import DirectProtocol, Role
from deconvd.direct.tls_engine import TlsEngine
from deconvd.direct.tls_stream import TlsStream
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_options import unix_path
from deconvd_client.credentials import NO_CREDENTIALS, Credentials
from deconvd_client.transports.side_sockets import Owners, any_owner, find_call_sockets, instance_of
from deconvd_client.transports.targets import host_of, resolver_of

__all__ = ["Connector", "InfoFetcher", "TcpConnector", "UnixConnector", "connector_for"]

InfoFetcher: TypeAlias = Callable[[], pb.GetServerInfoResponse]
"""Returns the GetServerInfo response of a server."""

_UNIX_CONNECT_TIMEOUT_S: Final = 0.5
"""How long a server may take to accept a connection by a Unix socket. After that calls go by gRPC."""

_TCP_CONNECT_TIMEOUT_S: Final = 5.0
"""The same by TCP."""

_MIN_TIMEOUT_S: Final = 1e-3
"""The shortest timeout that is set on a socket: 0 would mean none."""

_SEND_BUFFER_BYTES: Final = 1 << 20
"""Size of the send buffer of a Unix socket, if the system allows that much."""


class _DirectAddress(NamedTuple):
    """Where a server accepts direct connections.

    Attributes:
        path: Path of its socket.
        instance: Id of the server instance.
    """

    path: str
    instance: bytes


@dataclass(slots=True)
class UnixConnector:
    """Connects by a Unix socket on this host, which is next to the server's socket for gRPC.

    Attributes:
        path: Path of the socket for gRPC.
        credentials: What the client shows of itself. There is no TLS by Unix sockets.
        owners: Whose sockets are used.
    """

    path: str
    credentials: Credentials = NO_CREDENTIALS
    owners: Owners = any_owner
    _address: _DirectAddress | None = field(default=None, init=False, compare=False)
    """Where the last connection was opened; None if it failed, or there was none."""

    @property
    def is_address_known(self) -> bool:
        """Whether a connection can be opened without asking the server for the path."""
        return self._address is not None

    def connect(self, fetch_info: InfoFetcher, timeout_s: float) -> FrameStream:
        """Return a new connection, by the same socket as the last one; without a last one the server is asked for it.

        Raises:
            OSError: The server does not accept the connection in time.
            DeconvdError: What the server raised when it was asked for its socket.
        """
        address = self._address or self._find_address(fetch_info())
        timeout_s = min(max(timeout_s, _MIN_TIMEOUT_S), _UNIX_CONNECT_TIMEOUT_S)
        try:
            stream = self._connect_to(address, timeout_s)
        except OSError:
            self._address = None  # the server may have moved
            raise
        self._address = address
        return stream

    def _find_address(self, info: pb.GetServerInfoResponse) -> _DirectAddress:
        paths = find_call_sockets(info, self.path, self.owners)
        if not paths:
            raise ConnectionRefusedError("the server has no socket for direct connections here")
        return _DirectAddress(paths[0], instance_of(info))

    def _connect_to(self, address: _DirectAddress, timeout_s: float) -> FrameStream:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
            # connect() waits if the backlog of the server is full, as that of a stopped one is. Python's own timeout
            # would make the socket non-blocking, and then it fails at once instead.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(timeout_s))
            connection.connect(address.path)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval(0))
        except BaseException:
            connection.close()
            raise
        return _greet(
            SocketStream(connection), address.instance, self.credentials.token(), timeout_s
        )


@dataclass(frozen=True, slots=True)
class TcpConnector:
    """Connects by TCP to the host of the target, at the port that the server names.

    Attributes:
        host: Name or address of the host.
        credentials: What the client shows of itself, and whether it uses TLS.
    """

    host: str
    credentials: Credentials = NO_CREDENTIALS
    is_address_known = False

    def connect(self, fetch_info: InfoFetcher, timeout_s: float) -> FrameStream:
        """Return a new connection.

        Raises:
            OSError: The server does not accept the connection in time.
            DeconvdError: What the server raised when it was asked for its port.
        """
        info = fetch_info()
        if not info.direct_port:
            raise ConnectionRefusedError("the server accepts no direct connections by TCP")
        timeout_s = min(max(timeout_s, _MIN_TIMEOUT_S), _TCP_CONNECT_TIMEOUT_S)
        connection = socket.create_connection((self.host, info.direct_port), timeout_s)
        stream = self._encrypt(connection, timeout_s)
        instance = instance_of(info)
        return _greet(stream, instance, self.credentials.token(), timeout_s)

    def _encrypt(self, connection: socket.socket, timeout_s: float) -> SocketStream:
        """Return the connection as a stream: with TLS if there is TLS to the target, and never without it then."""
        state, tls = self.credentials.tls_state, self.credentials.tls
        if state is None or tls is None:
            return SocketStream(connection)
        name = (
            tls.server_name or self.host.partition("%")[0]
        )  # a link-local address has its interface
        stream = TlsStream(connection, TlsEngine(state.context, name))
        stream.set_deadline(timeout_s)
        try:
            stream.shake_hands()
        except BaseException:
            stream.close()
            raise
        return stream


def _greet(stream: SocketStream, instance: bytes, token: str, timeout_s: float) -> FrameStream:
    """Return a stream with frames, once the server has said that it is `instance`.

    Raises:
        ConnectionBrokenError: It is another one, does not know the token, or says nothing.
    """
    frames = FrameStream(stream, DirectProtocol(Role.CLIENT, instance))
    frames.set_deadline(timeout_s)
    try:
        frames.send(Hello(instance, token))
        frames.next_event()
    except BaseException:
        frames.close()
        raise
    return frames


Connector: TypeAlias = UnixConnector | TcpConnector


def connector_for(
    target: str, credentials: Credentials = NO_CREDENTIALS, owners: Owners = any_owner
) -> Connector | None:
    """Return the connector for a gRPC target; None if there can be no direct connections to it.

    Args:
        credentials: What the client shows of itself.
        owners: Whose Unix sockets are used.
    """
    path = unix_path(target)
    if path:
        return UnixConnector(path, credentials, owners) if hasattr(socket, "AF_UNIX") else None
    host = host_of(target)
    return TcpConnector(host, credentials) if host and not resolver_of(target) else None
