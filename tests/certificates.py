"""Certificates for tests: an authority, and what it signs, as files that servers and clients read."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtensionOID, NameOID

__all__ = ["Authority", "CertificateFiles"]


@dataclass(frozen=True)
class CertificateFiles:
    """A certificate with those between it and its authority, and its key, in PEM."""

    cert: Path
    key: Path

    def take_place_of(self, other: CertificateFiles) -> None:
        """Replace the files of another certificate by these, one after the other, as an operator does."""
        for mine, its in ((self.cert, other.cert), (self.key, other.key)):
            staged = its.with_suffix(".new")
            staged.write_bytes(mine.read_bytes())
            os.replace(staged, its)


class Authority:
    """Signs certificates.

    Attributes:
        ca: File with its own certificate, in PEM.

    Args:
        directory: Where its files go: a directory that exists.
    """

    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        self._directory = directory
        self._issued_count = 0
        self.ca = directory / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(
        self,
        *names: str,
        common_name: str | None = None,
        not_before: datetime.datetime | None = None,
        not_after: datetime.datetime | None = None,
    ) -> CertificateFiles:
        """Return the files of a new certificate, which is valid now by default.

        Args:
            names: Host names and addresses of a server; names, in the form of host names, of a client.
            common_name: The subject's CN; None for none.
            not_before, not_after: When it is valid; aware of their time zone.
        """
        made = self._authority.issue_cert(
            *names, common_name=common_name, not_before=not_before, not_after=not_after
        )
        files = self._next_files()
        for number, blob in enumerate(made.cert_chain_pems):
            blob.write_to_path(files.cert, append=number > 0)
        made.private_key_pem.write_to_path(files.key)
        return files

    def issue_unchecked(self, common_name: str, dns_name: bytes) -> CertificateFiles:
        """Return the files of a certificate whose names may be none: with null characters in them, say.

        Args:
            common_name: The subject's CN; empty for none.
            dns_name: The only DNS name.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.load_pem_x509_certificate(self._authority.cert_pem.bytes())
        authority_key = serialization.load_pem_private_key(
            self._authority.private_key_pem.bytes(), None
        )
        assert isinstance(authority_key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey))
        names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "deconvd")]
        if common_name:
            names.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name))
        general_name = b"\x82" + bytes([len(dns_name)]) + dns_name  # in DER
        general_names = b"\x30" + bytes([len(general_name)]) + general_name
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(names))
            .issuer_name(authority.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, general_names),
                critical=False,
            )
            .sign(authority_key, hashes.SHA256())
        )
        files = self._next_files()
        files.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files

    def _next_files(self) -> CertificateFiles:
        self._issued_count += 1
        return CertificateFiles(
            self._directory / f"cert-{self._issued_count}.pem",
            self._directory / f"key-{self._issued_count}.pem",
        )
