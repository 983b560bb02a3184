"""Finds out whether a channel broke since client and server do not agree on TLS, and says in one line what to change.

gRPC tells its client what is wrong with the server's certificate. But a server that does not take the client's
certificate, or the client's plain text, closes the connection without a word. So then one more connection is made by
Python's `ssl`, over which nothing is sent but a handshake.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
from contextlib import suppress
from typing import Final

from deconvd_client.credentials import Credentials, Tls
from deconvd_client.transports.grpc.proxies import Proxy
from deconvd_client.transports.targets import host_of, port_of, resolver_of

__all__ = ["find_tls_failure"]

_REFUSED_CERTIFICATE: Final = re.compile(r"CERTIFICATE_VERIFY_FAILED(?:: ([a-z -]+))?")
_WRONG_NAME: Final = re.compile(
    r"Hostname Verification Check failed|is not in peer certificate", re.IGNORECASE
)
_PLAIN_SERVER: Final = "WRONG_VERSION_NUMBER"
_ALERT: Final = re.compile(r"ALERT_[A-Z_]*(?:CERT|CA\b|HANDSHAKE_FAILURE|ACCESS_DENIED)")
_CLOSED: Final = re.compile(
    r"failed to connect to all addresses.*(?:Socket closed|Connection reset|[Hh]andshake|Unwrap failed)",
    re.DOTALL,
)
"""gRPC's message if a server accepted a connection and closed it before it was of use."""

_HTTP2: Final = ["h2"]

_PROBE_TIMEOUT_S: Final = 0.5
"""How long the handshake of a probe may take: it only makes an error clearer."""


def find_tls_failure(text: str, target: str, credentials: Credentials, proxy: Proxy | None) -> str:
    """Return what is wrong with TLS, and what to change; empty if nothing is, as far as can be known.

    Args:
        text: The message of a call that failed since no server was reached.
    """
    if credentials.tls is not None:
        if refused := _REFUSED_CERTIFICATE.search(text):
            return (
                f"the certificate of the server at {target} is not accepted: {refused[1] or 'verification failed'}. "
                "Give connect() tls=Tls(ca=...) with the authority that signed it, or set DECONVD_TLS_CA; if its time "
                "is over, it must be renewed"
            )
        if _WRONG_NAME.search(text):
            wanted = credentials.tls.server_name or host_of(target)
            return (
                f"the certificate of the server at {target} is not for the name {wanted}: connect to a name that it "
                "has, or give connect() tls=Tls(server_name=...)"
            )
        if _PLAIN_SERVER in text:
            return (
                f"the server at {target} speaks no TLS, and this client does: start the server with --tls-cert and "
                "--tls-key, or leave tls out of connect(), and DECONVD_TLS_CA and DECONVD_CLIENT_CERT out of the "
                "environment"
            )
        if _ALERT.search(text):
            return _certificate_failure(target, credentials.tls)
    if not _CLOSED.search(text) or proxy is not None or resolver_of(target) or not host_of(target):
        return ""
    if credentials.tls is None:
        if not _speaks_tls(target):
            return ""
        return (
            f"the server at {target} speaks TLS, and this client does not: give connect() tls=True, or "
            "tls=Tls(ca=...) with the authority that signed the server's certificate, or set DECONVD_TLS_CA"
        )
    return (
        _certificate_failure(target, credentials.tls) if _hangs_up(target, credentials.tls) else ""
    )


def _certificate_failure(target: str, tls: Tls) -> str:
    if tls.cert is None:
        return (
            f"the server at {target} asks for a client's certificate: give connect() tls=Tls(cert=..., key=...), or "
            "set DECONVD_CLIENT_CERT and DECONVD_CLIENT_KEY"
        )
    return (
        f"the server at {target} does not accept the certificate {tls.cert}: its time must have come and "
        "not be over, and an authority of the server's --tls-client-ca must have signed it"
    )


def _speaks_tls(target: str) -> bool:
    """Return whether a server answers a handshake of TLS. Nothing is sent to it, so its certificate does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(_HTTP2)
    with suppress(OSError, ValueError), _connect(target) as connection:
        try:
            context.wrap_socket(connection, server_hostname=host_of(target)).close()
        except ssl.SSLError as error:
            return bool(error.reason) and _ALERT.search(error.reason) is not None
        return True
    return False


def _hangs_up(target: str, tls: Tls) -> bool:
    """Return whether a server ends a connection after the client has shown its certificate, or none.

    In TLS 1.3 that is after the client's side of the handshake. Any server of HTTP/2 sends something first.
    """
    with suppress(OSError, ValueError), _connect(target) as connection:
        # a context of its own, since the one for direct connections must not be changed
        context = ssl.create_default_context(cafile=None if tls.ca is None else os.fspath(tls.ca))
        context.set_alpn_protocols(_HTTP2)
        if tls.cert is not None:
            context.load_cert_chain(tls.cert, tls.key, password="")
        name = tls.server_name or host_of(target)
        with context.wrap_socket(connection, server_hostname=name) as stream:
            try:
                return stream.recv(1) == b""
            except TimeoutError:
                return False
            except (ssl.SSLError, ConnectionError):
                return True
    return False


def _connect(target: str) -> socket.socket:
    return socket.create_connection((host_of(target), port_of(target)), _PROBE_TIMEOUT_S)
