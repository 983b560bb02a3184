"""The server's certificate and key, and whose certificates it takes from clients."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final, NamedTuple

from deconvd.host.watched_files import WatchedFiles

__all__ = ["ServerTls", "ServerTlsState"]


class ServerTlsState(NamedTuple):
    """What the files mean at one moment.

    Attributes:
        context: For direct connections.
        cert, key: The server's certificate with those between it and its authority, and its key, in PEM.
        client_ca: The certificates of those who may sign clients', in PEM; None if clients show none.
    """

    context: ssl.SSLContext
    cert: bytes
    key: bytes
    client_ca: bytes | None

    def __repr__(self) -> str:
        return "ServerTlsState()"  # a key must be in no text


class ServerTls:
    """How connections by TCP are encrypted. The files are read again when they change. Thread-safe.

    Args:
        cert: File with the server's certificate, and those between it and its authority, in PEM.
        key: File with its key.
        client_ca: File with the certificates of those who may sign clients'. Each client must show one then. None to
            ask for none.

    Raises:
        OSError, ValueError: A file cannot be used.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        paths = [path for path in (cert, key, client_ca) if path is not None]
        self._files: Final = WatchedFiles(paths, self._load)

    @property
    def requires_certificates(self) -> bool:
        """Whether clients must show certificates: gRPC can require them or not ask for them, and nothing in between."""
        return self._client_ca is not None

    def current(self) -> ServerTlsState:
        """Return what the files mean now. The same object until they change."""
        return self._files.current()

    def _load(self) -> ServerTlsState:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.num_tickets = 0  # no client resumes a session: each shows its certificate again
        context.load_cert_chain(self._cert, self._key, _refuse_to_decrypt)
        client_ca = None
        if self._client_ca is not None:
            client_ca = self._client_ca.read_bytes()
            context.load_verify_locations(self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return ServerTlsState(context, self._cert.read_bytes(), self._key.read_bytes(), client_ca)


def _refuse_to_decrypt() -> str:
    """Stand for the password of an encrypted key, for which OpenSSL would ask on the terminal and wait."""
    raise ValueError("the key is encrypted, and must not be: deconvd-server asks for no password")
