"""Certificates with damage inside that their authority has signed all the same, so that TLS trusts them."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

from deconvd_client import Tls

__all__ = ["NAME", "Signer", "nameless", "unsigned_certificates"]

NAME = "fuzz.example"
"""The name in the certificates of clients that have one."""

_KEY = Path(__file__).parents[1] / "data" / "fuzzed-key.pem"
_ISSUER = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "nobody")])
_BEGIN = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_END = datetime.datetime(2200, 1, 1, tzinfo=datetime.UTC)
_KEY_ID = bytes(range(20))
_ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
_IP_LOOPBACK = b"\x87\x04\x7f\0\0\1"


def _dns(name: bytes) -> bytes:
    return b"\x82" + bytes([len(name)]) + name


def _unsigned(common_name: str, *names: bytes) -> bytes:
    """Return the part of a certificate that is signed: always the same bytes.

    Args:
        names: The general names, in DER.
    """
    key = ec.generate_private_key(ec.SECP256R1())  # only the form of its signature counts
    subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fuzz")]
    if common_name:
        subject.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name))
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name(subject))
        .issuer_name(_ISSUER)
        .public_key(_own_key().public_key())
        .serial_number(1)
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier(_KEY_ID, None, None), critical=False)
    )
    if names:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(
                ExtensionOID.SUBJECT_ALTERNATIVE_NAME, _der(0x30, b"".join(names))
            ),
            critical=False,
        )
    return builder.sign(key, hashes.SHA256()).tbs_certificate_bytes


def unsigned_certificates() -> list[bytes]:
    """Return the insides of certificates: of servers and clients, with names of every kind."""
    loopback = (_IP_LOOPBACK, _dns(b"localhost"))
    uri = b"\x86\x0aurn:fuzz:1"
    email = b"\x81\x09a@b.local"
    return [
        _unsigned("", *loopback),
        _unsigned(NAME, *loopback),
        _unsigned(NAME, *loopback, uri, email, _dns(b"\xff\xfe")),
        _unsigned("", _dns(b"\xff\xfe"), *loopback),
        _unsigned("a\0b", *loopback),
        _unsigned("", _dns(b"a\0b"), *loopback),
    ]


def nameless() -> bytes:
    """Return the inside of a certificate that says nobody's name."""
    return _unsigned("")


class Signer:
    """An authority that signs whatever it is given.

    Attributes:
        ca: File with its certificate, in PEM.
        key: File with the key of all that it signs.

    Args:
        directory: Where its files go.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.key = directory / "key.pem"
        self.key.write_bytes(_KEY.read_bytes())
        self.ca = directory / "ca.pem"
        authority = (
            x509.CertificateBuilder()
            .subject_name(_ISSUER)
            .issuer_name(_ISSUER)
            .public_key(self._key.public_key())
            .serial_number(2)
            .not_valid_before(_BEGIN)
            .not_valid_after(_END)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier(_KEY_ID), critical=False)
            .add_extension(_may_sign(), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca.write_bytes(authority.public_bytes(serialization.Encoding.PEM))

    def sign(self, unsigned: bytes, name: str = "cert") -> Path:
        """Return the file, in PEM, of a certificate with this inside. It replaces the last one of that name."""
        signature = self._key.sign(unsigned, ec.ECDSA(hashes.SHA256()))
        der = _der(0x30, unsigned + _ECDSA_WITH_SHA256 + _der(0x03, b"\0" + signature))
        path = self._directory / f"{name}.pem"
        path.write_text(ssl.DER_cert_to_PEM_cert(der))
        return path

    def tls(self, cert: Path | None = None) -> Tls:
        """Return TLS of a client that trusts it."""
        return Tls(self.ca, cert, None if cert is None else self.key)


def _may_sign() -> x509.KeyUsage:
    no = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(digital_signature=True, key_cert_sign=True, **no)


def _own_key() -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(_KEY.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(digits)]) + digits + content
