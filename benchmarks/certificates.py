"""Certificates of an authority of one's own, for the servers that are measured."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import trustme

__all__ = ["ServerCertificate", "write_certificate"]


class ServerCertificate(NamedTuple):
    """The files of a certificate.

    Attributes:
        cert: The certificate.
        key: Its key.
        ca: The certificate of its authority.
    """

    cert: Path
    key: Path
    ca: Path


def write_certificate(directory: Path, host: str) -> ServerCertificate:
    """Write a new certificate for a host into a directory that exists."""
    authority = trustme.CA()
    issued = authority.issue_cert(host)
    files = ServerCertificate(*(directory / f"{name}.pem" for name in ServerCertificate._fields))
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(files.cert, append=number > 0)
    issued.private_key_pem.write_to_path(files.key)
    authority.cert_pem.write_to_path(files.ca)
    return files
