"""Servers in this process whose direct connections have TLS, and ask who calls."""

from __future__ import annotations

import datetime
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deconvd_client
from deconvd.direct.frame_stream import FrameStream
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client import Connection, Tls
from deconvd_client.credentials import Credentials
from deconvd_client.transports.direct.connectors import TcpConnector
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.call.context import CallContext
from deconvd_server.daemon import Daemon, DaemonState
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.settings import Settings
from deconvd_server.transports.direct.server import DirectServer
from deconvd_server.transports.observers import CallLog
from tests.certificates import CertificateFiles

__all__ = ["DAY", "NamedTokens", "SecuredServer", "secured_server"]

DAY = datetime.timedelta(days=1)

MIB = 1 << 20


class NamedTokens(dict[str, str]):
    """Valid tokens, and whose each is."""

    def name_of(self, token: str) -> str | None:
        """See `TokenTable`."""
        return self.get(token)


@dataclass
class SeenCalls:
    """Notes who makes calls, and by what: an observer of a server."""

    calls: list[tuple[str, str, str]] = field(default_factory=list)

    def begin(self, method: str, call: CallContext) -> None:
        """Note a call."""
        self.calls.append((method, call.identity, call.peer_key))

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """See `Observer`."""


@dataclass(frozen=True)
class SecuredServer:
    """A server.

    Attributes:
        targets: Its addresses: by TCP, and then by a Unix socket if it has one.
        seen: The calls that it has served.
    """

    daemon: Daemon
    targets: list[str]
    seen: SeenCalls

    @property
    def target(self) -> str:
        return self.targets[0]

    @property
    def direct(self) -> DirectServer:
        backend = self.daemon.backend
        assert backend is not None
        assert backend._direct is not None
        return backend._direct

    def info(self) -> pb.GetServerInfoResponse:
        """Return what it says of itself."""
        direct = self.direct
        (port,) = {
            s.getsockname()[1]
            for s in direct._listener._sockets.values()
            if s.family != socket.AF_UNIX
        }
        return pb.GetServerInfoResponse(direct_port=port, instance_id=direct._instance.hex())

    @property
    def address(self) -> tuple[str, int]:
        """Where it accepts direct connections by TCP."""
        return "127.0.0.1", self.info().direct_port

    @property
    def greetings_count(self) -> int:
        """How many clients are being greeted."""
        return len(self.direct._greeter._greetings)

    def open_stream(self, tls: Tls | None, token: str = "", host: str = "127.0.0.1") -> FrameStream:
        """Return a direct connection by TCP. Raises OSError if the server or the client refuses it."""
        stream = TcpConnector(host, Credentials(lambda: token, tls)).connect(self.info, 30)
        stream.set_deadline(60)
        return stream

    def connect(self, tls: Tls | None, **options: Any) -> Connection:
        """Return a connection to it by TCP."""
        options.setdefault("transport", "tcp")
        return deconvd_client.connect(self.target, tls=tls or False, **options)


@contextmanager
def secured_server(
    certificate: CertificateFiles | None,
    *,
    client_ca: Path | None = None,
    tokens: NamedTokens | None = None,
    unix_path: Path | None = None,
) -> Iterator[SecuredServer]:
    """Run a server for the block.

    Args:
        certificate: Its certificate; None for none, and no TLS.
        client_ca: Whose certificates it requires of clients; None for no certificates.
        tokens: The tokens that it takes.
        unix_path: A Unix socket where it listens, too.
    """
    tls = None
    if certificate is not None:
        tls = ServerTls(certificate.cert, certificate.key, client_ca)
    addresses = ["127.0.0.1:0", *([f"unix:{unix_path}"] if unix_path else [])]
    settings = Settings(
        addresses,
        64 * MIB,
        10,
        shared_memory_bytes=64 * MIB if unix_path else 0,
        authenticator=Authenticator(tokens, takes_certificates=client_ca is not None),
        tls=tls,
    )
    seen = SeenCalls()
    daemon = Daemon(settings, [CallLog(), seen])
    daemon.serve(lambda: [CpuDevice(1)])
    try:
        yield SecuredServer(daemon, list(daemon.addresses), seen)
    finally:
        if daemon.state is DaemonState.SERVING:
            daemon.cut_drain()
            daemon.drain()
