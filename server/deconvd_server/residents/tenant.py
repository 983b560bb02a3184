"""Tenants and their sessions, as plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from deconvd_server.resources.fair_shares import PeerPlace

__all__ = ["Session", "SessionState", "Tenant"]


@dataclass(frozen=True, eq=False, slots=True)
class Tenant:
    """Clients that share a secret key, and with it a quota and their resident tensors.

    Attributes:
        quota_bytes: How many bytes its resident tensors may be charged for.
        key: The secret key that its clients send; empty if the tenant has one session alone.
        hits: How often one of its tensors was in the memory where a call needed it, by memory tier.
        misses: How often a tensor had to be brought or sent there, by memory tier.
    """

    quota_bytes: int
    key: bytes = b""
    hits: Counter[object] = field(default_factory=Counter)
    misses: Counter[object] = field(default_factory=Counter)


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
