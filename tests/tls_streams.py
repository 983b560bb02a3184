"""Both ends of a connection with TLS in one process, for tests of what is beneath the protocol."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.direct.tls_engine import TlsEngine
from deconvd.direct.tls_stream import TlsStream
from tests.certificates import Authority, CertificateFiles

__all__ = [
    "client_context",
    "connect_engines",
    "established_engines",
    "server_context",
    "taken",
    "tls_streams",
]


def client_context(ca: Path, certificate: CertificateFiles | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca))
    if certificate is not None:
        context.load_cert_chain(certificate.cert, certificate.key)
    return context


def server_context(certificate: CertificateFiles) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.cert, certificate.key)
    return context


def connect_engines(client: TlsEngine, server: TlsEngine) -> None:
    """Let two ends shake hands. Raises the error of the client, or else that of the server."""
    failures: dict[TlsEngine, ConnectionClosedError] = {}
    for _ in range(4):
        for here, there in ((client, server), (server, client)):
            if not here.is_established and here not in failures:
                try:
                    here.shake_hands()
                except ConnectionClosedError as error:
                    failures[here] = error
            there.feed(here.take_unsent())
    if failures:
        raise failures.get(client) or failures[server]


def established_engines(
    authority: Authority, certificate: CertificateFiles, *, version: ssl.TLSVersion | None = None
) -> tuple[TlsEngine, TlsEngine]:
    """Return a client's end and its server's.

    Args:
        version: The version of TLS; None for the newest.
    """
    serving = server_context(certificate)
    if version is not None:
        serving.maximum_version = version
    client = TlsEngine(client_context(authority.ca), "localhost")
    server = TlsEngine(serving, None)
    connect_engines(client, server)
    return client, server


@contextmanager
def tls_streams(
    engines: tuple[TlsEngine, TlsEngine], *, stall_limit_s: float = float("inf")
) -> Iterator[tuple[TlsStream, TlsStream]]:
    """Give the block a client's stream and its server's."""
    one, other = socket.socketpair()
    client, server = engines
    with (
        closing(TlsStream(one, client, stall_limit_s=stall_limit_s)) as near,
        closing(TlsStream(other, server, stall_limit_s=stall_limit_s)) as far,
    ):
        yield near, far


def taken(stream: TlsStream, size_bytes: int) -> bytes:
    target = memoryview(bytearray(size_bytes))
    stream.fill(target)
    return bytes(target)
