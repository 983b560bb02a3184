"""Who is at the other end of a connection, as long as what it has shown holds."""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from deconvd.errors import UnauthenticatedError
from deconvd_server.access.caller_proof import NO_CERTIFICATE, CallerProof, ShownCertificate

__all__ = ["CallerPass", "certificate_name", "shown_certificate"]

_CHECK_PERIOD_S: Final = 1.0
"""How often what the client has shown is looked at again: that long a revoked token may still count."""


class CallerPass:
    """What the client of one connection has shown when it was made, and who it is. Thread-safe.

    Attributes:
        caller: The client.

    Raises:
        UnauthenticatedError: The client must prove who it is, and has not.
    """

    def __init__(self, proof: CallerProof) -> None:
        self._proof = proof
        self.caller: Final = proof.identify()
        self._is_valid = True
        may_end = bool(self.caller.identity)  # what proved no identity has no end
        self._check_due_s = time.monotonic() + _CHECK_PERIOD_S if may_end else math.inf

    def __repr__(self) -> str:
        return f"CallerPass({self.caller})"

    def is_valid(self) -> bool:
        """Return whether the client is still who it was, as of a second ago at most."""
        now_s = time.monotonic()
        if now_s >= self._check_due_s:
            self._check_due_s = now_s + _CHECK_PERIOD_S
            self._is_valid = self._check()
        return self._is_valid

    def _check(self) -> bool:
        try:
            return self._proof.identify() == self.caller
        except UnauthenticatedError:
            return False


def shown_certificate(certificate: Mapping[str, Any]) -> ShownCertificate:
    """Return what counts of a certificate.

    Args:
        certificate: As `ssl.SSLObject.getpeercert` has it; empty if the peer has shown none.
    """
    if not certificate:
        return NO_CERTIFICATE
    return ShownCertificate(
        certificate_name(certificate), ssl.cert_time_to_seconds(certificate["notAfter"])
    )


def certificate_name(certificate: Mapping[str, Any]) -> str:
    """Return whose certificate it is: the subject's CN, else its first DNS name; empty if it has none."""
    name = next(_names(certificate), "")
    return (
        name if name.isprintable() else ""
    )  # what is before a null character may be another's name


def _names(certificate: Mapping[str, Any]) -> Iterator[str]:
    for relative_name in certificate.get("subject", ()):
        for kind, value in relative_name:
            if kind == "commonName":
                yield value
    for kind, value in certificate.get("subjectAltName", ()):
        if kind == "DNS":
            yield value
