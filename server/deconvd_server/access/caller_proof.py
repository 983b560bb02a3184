"""What a caller has shown, and who that makes it: both transports ask here."""

from __future__ import annotations

import math
import time
from typing import Final, NamedTuple

from deconvd_server.access.authenticator import Authenticator, Caller

__all__ = ["NO_CERTIFICATE", "CallerProof", "ShownCertificate"]


class ShownCertificate(NamedTuple):
    """A certificate that TLS has checked when the connection was made, which may last longer than the certificate.

    Attributes:
        name: The name in it; empty for none.
        end_s: Until when it is valid, in seconds of the wall clock since 1970.
    """

    name: str
    end_s: float


NO_CERTIFICATE: Final = ShownCertificate("", math.inf)
"""Stands for the certificate of a caller that has shown none."""


class CallerProof:
    """What a caller has shown. It has no `repr` of its own: a token must be in no text. Thread-safe.

    Args:
        authenticator: Says who the caller is.
        peer_key: The peer that it counts for if it proves no identity.
        token: What it sent as its token; empty if nothing.
        certificate: Its certificate.
        is_local: Whether it came by a Unix socket.
    """

    __slots__ = ("_authenticator", "_certificate", "_is_local", "_peer_key", "_token")

    def __init__(
        self,
        authenticator: Authenticator,
        peer_key: str,
        *,
        token: str,
        certificate: ShownCertificate,
        is_local: bool,
    ) -> None:
        self._authenticator = authenticator
        self._peer_key = peer_key
        self._token = token
        self._certificate = certificate
        self._is_local = is_local

    def identify(self) -> Caller:
        """Return who the caller is, as of now: a token may be revoked, and a certificate end.

        Raises:
            UnauthenticatedError: It must prove who it is, and has not.
        """
        has_ended = time.time() > self._certificate.end_s
        return self._authenticator.identify(
            self._peer_key,
            token=self._token,
            certificate_name="" if has_ended else self._certificate.name,
            is_local=self._is_local,
        )
