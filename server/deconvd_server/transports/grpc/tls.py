"""TLS of the server's gRPC ports, with certificates that are read again when their files change."""

from __future__ import annotations

from typing import Any

import grpc

from deconvd_server.access.server_tls import ServerTls, ServerTlsState
from deconvd_server.transports.grpc.core import cygrpc

__all__ = ["server_credentials"]


def server_credentials(tls: ServerTls) -> Any:
    """Return gRPC's credentials for one port. The caller must keep them for as long as the server exists.

    gRPC asks for the certificates before each handshake. Connections that exist go on with those that they began with.
    Each port needs credentials of its own, since gRPC asks once for the first certificates of all ports.
    """
    state = tls.current()

    def fetch_changed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal state
        current = tls.current()
        if current is state:
            return None
        state = current
        return _certificates(state)

    return cygrpc.server_credentials_ssl_dynamic_cert_config(
        _certificates(state), fetch_changed, tls.requires_certificates
    )


def _certificates(state: ServerTlsState) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(state.key, state.cert)], state.client_ca)
