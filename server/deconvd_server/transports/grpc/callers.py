"""Reads who makes a gRPC call, from its token, the certificate that TLS has checked, and the socket it came through."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from deconvd.errors import UnauthenticatedError
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.bearer_token import bearer_token
from deconvd_server.access.caller_proof import NO_CERTIFICATE, CallerProof, ShownCertificate
from deconvd_server.access.certificate_end import certificate_end_s
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.log_text import FIELDS
from deconvd_server.resources.peer_identity import peer_key_of_grpc
from deconvd_server.transports.grpc.core import cygrpc

__all__ = ["CallerReader", "log_refusal"]

_AUTHORIZATION: Final = "authorization"
_PEM: Final = b"x509_pem_cert"
_PATH_LENGTH: Final = 200
"""How many characters of a method's path the log gets: clients choose them."""

_log = logging.getLogger(__name__)


class CallerReader:
    """Reads what calls show of their callers.

    Args:
        takes_certificates: Whether TLS has checked the certificates of clients that came by TCP.
    """

    def __init__(
        self, authenticator: Authenticator | None = None, *, takes_certificates: bool = False
    ) -> None:
        self._authenticator = authenticator or Authenticator()
        self._takes_certificates = takes_certificates
        self.is_open: Final = self._authenticator.is_open
        """Whether callers need no identity: then there is nothing to read."""
        self.refused_count = 0
        """How many calls were refused since they proved no identity. Only gRPC's thread sets it."""

    def read(self, call: Any, metadata: Iterable[Any], peer: str) -> CallerProof:
        """Return what a call has shown.

        Args:
            call: The call, as gRPC's core has it.
            metadata: Its keys and values.
            peer: Its peer, as gRPC names it.

        Raises:
            UnauthenticatedError: It has shown a token in another form.
        """
        is_local = peer.startswith("unix:")
        token, certificate = "", NO_CERTIFICATE
        if self._authenticator.takes_tokens:
            token = bearer_token([value for key, value in metadata if key == _AUTHORIZATION])
        if self._takes_certificates and not is_local:
            certificate = _shown_certificate(cygrpc.auth_context(call))
        return CallerProof(
            self._authenticator,
            peer_key_of_grpc(peer),
            token=token,
            certificate=certificate,
            is_local=is_local,
        )

    def note_refusal(self, path: str, peer: str, error: UnauthenticatedError) -> None:
        """Count a call that is refused, and log it."""
        self.refused_count += 1
        log_refusal(path, peer, error)


def log_refusal(path: str, peer: str, error: UnauthenticatedError) -> None:
    """Log a refused call. All are of one kind, whatever they say: who has no credentials must not fill the log."""
    method = path[:_PATH_LENGTH]
    _log.warning(
        "%s from %s: %s: %s",
        method,
        peer,
        error.status,
        error,
        extra={
            REPEAT_KEY: __name__,
            FIELDS: {"method": method, "peer": peer, "status": error.status},
        },
    )


def _shown_certificate(properties: Mapping[bytes, Sequence[bytes]]) -> ShownCertificate:
    pem = properties.get(_PEM, (b"",))[0]
    return ShownCertificate(_certificate_name(properties), certificate_end_s(pem))


def _certificate_name(properties: Mapping[bytes, Sequence[bytes]]) -> str:
    """Return the name in a certificate: its common name, else its first DNS name; empty if it has neither.

    gRPC hands names over up to their first null character. A name with one counts as none: what is before it could be
    the name of another client.
    """
    name = properties.get(b"x509_common_name", (b"",))[0]
    if name:
        is_whole = b"\\00" not in properties.get(b"x509_subject", (b"",))[0]
    else:
        name = properties.get(b"peer_dns", (b"",))[0]
        is_whole = _has_whole(name, properties.get(_PEM, (b"",))[0])
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return ""
    return text if is_whole and text.isprintable() else ""


@lru_cache(maxsize=256)
def _has_whole(name: bytes, certificate: bytes) -> bool:
    """Return whether a DNS name is in a certificate, in PEM, and not followed by a null character there."""
    try:
        der = ssl.PEM_cert_to_DER_cert(certificate.decode())
    except ValueError:
        return False
    return name in der and name + b"\0" not in der
