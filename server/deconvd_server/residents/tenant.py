"""Tenants and their sessions, as plain values."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import StrEnum

from deconvd_server.call.context import CallContext
from deconvd_server.resources.fair_shares import PeerPlace
from deconvd_server.resources.shared_quotas import OWNER_BYTES

__all__ = ["Session", "SessionState", "Tenant", "tenant_of"]


@dataclass(frozen=True, eq=False, slots=True)
class Tenant:
    """Clients that share their resident tensors: those of one identity that send the same secret key.

    Attributes:
        quota_bytes: How many bytes the resident tensors of its owner may be charged for.
        key: The secret key that its clients send. Without a key, clients with an identity are one tenant, and each
            session without an identity is a tenant of its own.
        identity: The name that its clients have proved; empty for none.
        hits: How often one of its tensors was in the memory where a call needed it, by memory tier.
        misses: How often a tensor had to be brought or sent there, by memory tier.
        evictions: How often one of its tensors had to leave a memory for others, by memory tier.
    """

    quota_bytes: int
    key: bytes = b""
    identity: str = ""
    hits: Counter[object] = field(default_factory=Counter)
    misses: Counter[object] = field(default_factory=Counter)
    evictions: Counter[object] = field(default_factory=Counter)

    @property
    def owner(self) -> Hashable:
        """Whose quota and whose shares of memory it uses: those of its identity, or its own if it has none.

        All tenants of one identity have one owner, so that an identity gets no more by using several keys.
        """
        return self.identity or self

    @property
    def shared_key(self) -> bytes:
        """By which other processes of the server know its owner. Empty for a session that is its own tenant."""
        kind, name = (b"identity", self.identity.encode()) if self.identity else (b"key", self.key)
        return hashlib.blake2b(name, digest_size=OWNER_BYTES, person=kind).digest() if name else b""


class SessionState(StrEnum):
    """State of a session: see `Session`."""

    OPEN = "open"
    BROKEN = "broken"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Session:
    """The scope in which a client's resident tensors have names. Only `Sessions` changes it.

        OPEN <--resume, stream breaks--> BROKEN
        OPEN --stream closed, or lease expired--> ENDED
        BROKEN --not resumed in time--> ENDED
        OPEN, BROKEN --preempted by another peer's session--> ENDED

    Attributes:
        name: Its secret name.
        close_stream: Closes the stream that holds it.
        deadline_s: When it ends unless its client gives a sign of life, on the clock of `Sessions`.
        place: Its place among the sessions of all peers. The place is idle while no tensor has a name in the session.
    """

    name: bytes
    tenant: Tenant
    close_stream: Callable[[], None]
    deadline_s: float
    place: PeerPlace
    state: SessionState = SessionState.OPEN


def tenant_of(call: CallContext) -> Tenant | None:
    """Return the tenant for whom a call is; None for a call without a session."""
    return call.tenant if isinstance(call.tenant, Tenant) else None
