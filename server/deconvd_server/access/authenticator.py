"""Says who a caller is, from what it shows: a token, a certificate, or that it is on this host."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from deconvd.errors import UnauthenticatedError

__all__ = ["Authenticator", "Caller", "TokenTable"]


class Caller(NamedTuple):
    """Who makes a call.

    Attributes:
        identity: The name that the caller has proved, which is its tenant's; empty if the server asks for none.
        peer_key: The peer that it counts for where peers share: all callers of one identity are one peer.
    """

    identity: str
    peer_key: str


class TokenTable(Protocol):
    """The tokens that are valid."""

    def name_of(self, token: str) -> str | None:
        """Return whose token it is; None if it is unknown or out of its time."""


class Authenticator:
    """Says who a caller is. Thread-safe.

    A token counts before a certificate: a proxy speaks for many. Callers by a Unix socket need neither, since its
    permissions say who may open it; a token counts there, too.

    Args:
        tokens: The valid tokens; None if the server takes none.
        takes_certificates: Whether the certificates of clients have been checked by TLS.

    Attributes:
        takes_tokens: Whether the server takes tokens.
        is_open: Whether callers need no identity at all.
    """

    def __init__(
        self, tokens: TokenTable | None = None, *, takes_certificates: bool = False
    ) -> None:
        self._tokens = tokens
        self.takes_tokens: Final = tokens is not None
        self.is_open: Final = tokens is None and not takes_certificates

    def identify(
        self, peer_key: str, *, token: str, certificate_name: str, is_local: bool
    ) -> Caller:
        """Return who a caller is.

        Args:
            peer_key: The peer that it counts for if it proves no identity.
            token: What it sent as its token; empty if nothing.
            certificate_name: The name in its certificate, which TLS has checked; empty if it has shown none.
            is_local: Whether it came by a Unix socket.

        Raises:
            UnauthenticatedError: It must prove who it is, and has not.
        """
        if token and self._tokens is not None:
            name = self._tokens.name_of(token)
            if name is None:
                raise UnauthenticatedError(
                    "token must be one that this server knows and whose time has come and is not over, and the one "
                    "given is not"
                )
        else:
            name = certificate_name
        if name:
            return Caller(name, f"tenant {name}")
        if self.is_open or is_local:
            return Caller("", peer_key)
        raise UnauthenticatedError(
            "this server must know who calls: give connect() a token, or set DECONVD_TOKEN"
            if self._tokens is not None
            else "this server must know who calls: give connect() a certificate, tls=Tls(cert=..., key=...)"
        )
