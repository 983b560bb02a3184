"""What a client shows of itself, and whom it trusts: a token, and the files of TLS."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

from deconvd.errors import InvalidArgumentError
from deconvd.host.watched_files import WatchedFiles

__all__ = ["NO_CREDENTIALS", "CallMetadata", "ClientTlsState", "Credentials", "Tls"]

CallMetadata: TypeAlias = tuple[tuple[str, str], ...]
"""What a gRPC call carries beside its messages."""

_KEY_VALUES_MISMATCH: Final = "KEY_VALUES_MISMATCH"


@dataclass(frozen=True)
class Tls:
    """How a client encrypts, and whom it trusts. The files are read again when they change.

    Attributes:
        ca: File with the certificates, in PEM, of those who may sign the server's; None for those that the system
            trusts.
        cert: File with the client's own certificate, and those between it and its authority, in PEM; None for none.
        key: File with the key of `cert`, without a passphrase. Neither is given without the other.
        server_name: The name that the server's certificate must have; None for the host of the target.

    Raises:
        InvalidArgumentError: An attribute has a wrong type, or `cert` and `key` are not given together.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("ca", "cert", "key"):
            path = getattr(self, name)
            if path is not None and not _is_path(path):
                raise _error(f"must have the path of a file as {name}, got {path!r}")
        host = self.server_name
        if host is not None and not (isinstance(host, str) and host and host.isascii()):
            raise _error(f"must have a host's name as server_name, got {host!r}")
        if (self.cert is None) != (self.key is None):
            given, missing = ("cert", "key") if self.key is None else ("key", "cert")
            raise _error(f"must have cert and key or neither, got {given} without {missing}")


class ClientTlsState(NamedTuple):
    """What the files of TLS mean at one moment.

    Attributes:
        context: For direct connections.
        ca, cert, key: The same for gRPC, in PEM; None for none.
    """

    context: ssl.SSLContext
    ca: bytes | None
    cert: bytes | None
    key: bytes | None

    def __repr__(self) -> str:
        return "ClientTlsState()"  # a key must be in no text


class Credentials:
    """What a client shows of itself to a server, and how it knows the server. Thread-safe.

    Neither its `repr` nor a pickle has the token.

    Args:
        token: Returns the token to send now; an empty one for none.
        tls: How to encrypt; None not to.
        headers: What its gRPC calls carry beside the token.

    Raises:
        InvalidArgumentError: A file cannot be used.
    """

    def __init__(
        self,
        token: Callable[[], str] = str,
        tls: Tls | None = None,
        headers: CallMetadata = (),
    ) -> None:
        self.tls: Final = tls
        self.token: Final = token
        self._headers = headers
        self._metadata: tuple[str, CallMetadata | None] = ("", headers or None)
        self._files: WatchedFiles[ClientTlsState] | None = None
        if tls is not None:
            paths = [Path(path) for path in (tls.ca, tls.cert, tls.key) if path is not None]
            try:
                self._files = WatchedFiles(paths, lambda: _load(tls))
            except (OSError, ValueError) as error:
                raise _error(
                    f"must name files with certificates and keys in PEM: {error}"
                ) from None

    def __repr__(self) -> str:
        return f"Credentials({'a token' if self.token() else 'no token'}, {self.tls})"

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to protect: no token, and no TLS."""
        return self.tls is None and not self.token()

    @property
    def tls_state(self) -> ClientTlsState | None:
        """What the files of TLS mean now; None without TLS. The same object until they change."""
        return None if self._files is None else self._files.current()

    def fresh_tls_state(self) -> ClientTlsState | None:
        """Return `tls_state` as of this very moment: for a handshake that has failed."""
        return None if self._files is None else self._files.refresh()

    def metadata(self) -> CallMetadata | None:
        """Return what a gRPC call must carry; None if nothing."""
        token = self.token()
        known, metadata = self._metadata
        if token != known:
            bearer: CallMetadata = (("authorization", f"Bearer {token}"),) if token else ()
            metadata = (*bearer, *self._headers) or None
            self._metadata = (token, metadata)
        return metadata

    def for_name(self, name: str) -> Credentials:
        """Return the same credentials for an address of a host, whose certificate has the name of the host."""
        if self.tls is None or self.tls.server_name is not None:
            return self
        return Credentials(self.token, replace(self.tls, server_name=name), self._headers)

    def with_header(self, name: str, value: str) -> Credentials:
        """Return the same credentials with one more header."""
        return Credentials(self.token, self.tls, (*self._headers, (name, value)))

    def without_tls(self) -> Credentials:
        """Return the same credentials for a Unix socket, which never has TLS."""
        return self if self.tls is None else Credentials(self.token, headers=self._headers)


NO_CREDENTIALS: Final = Credentials()
"""No token and no TLS."""


def _load(tls: Tls) -> ClientTlsState:
    """Read the files. Raises OSError or ValueError if they cannot be used."""
    ca, cert, key = (
        None if path is None else Path(path).read_bytes() for path in (tls.ca, tls.cert, tls.key)
    )
    try:
        context = ssl.create_default_context(cafile=None if tls.ca is None else os.fspath(tls.ca))
    except ssl.SSLError:
        raise ValueError(f"{tls.ca} has no certificates in PEM") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    if tls.cert is not None:
        try:
            # with a passphrase given, OpenSSL does not ask for one at the terminal
            context.load_cert_chain(tls.cert, tls.key, password="")
        except ssl.SSLError as error:
            if error.reason == _KEY_VALUES_MISMATCH:
                raise ValueError(f"{tls.key} is not the key of {tls.cert}") from None
            raise ValueError(
                f"{tls.cert} and {tls.key} are not a certificate and its key in PEM, without a passphrase"
            ) from None
    if ca is None:
        # gRPC has a list of its own, which lacks the authorities that this system's owner has added
        ders = context.get_ca_certs(binary_form=True)
        ca = "".join(map(ssl.DER_cert_to_PEM_cert, ders)).encode() or None
    return ClientTlsState(context, ca, cert, key)


def _is_path(path: object) -> bool:
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    return isinstance(text, str) and bool(text)


def _error(allowed: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"tls {allowed}", argument="tls")
