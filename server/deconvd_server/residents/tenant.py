"""Who has what: tenants and their sessions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from deconvd_server.resources.fair_shares import PeerPlace

__all__ = ["Session", "SessionState", "Tenant"]


@dataclass(frozen=True, eq=False, slots=True)
class Tenant:
    """Those who share a secret, and with it a quota and their tensors.

    Attributes:
        quota_bytes: What it may keep.
        key: What its clients tell; empty if it is one session's own.
        hits: Times that a tensor of its own was where it was needed, by where that is.
        misses: Times that it had to be brought there.
    """

    quota_bytes: int
    key: bytes = b""
    hits: Counter[object] = field(default_factory=Counter)
    misses: Counter[object] = field(default_factory=Counter)


class SessionState(StrEnum):
    """What has become of a session."""

    OPEN = "open"
    BROKEN = "broken"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Session:
    """What a client's tensors are kept for. `Sessions` alone changes it.

        OPEN <--resume, stream breaks--> BROKEN
        OPEN --stream closed, or lease passed--> ENDED
        BROKEN --not resumed in time--> ENDED
        OPEN, BROKEN --had to give way to another peer's--> ENDED

    Attributes:
        name: Its secret name.
        hang_up: Ends the stream that holds it.
        deadline_s: When it ends unless something happens before, on the clock of `Sessions`.
        place: That of its peer. It is idle while nothing has a name in the session.
    """

    name: bytes
    tenant: Tenant
    close_stream: Callable[[], None]
    deadline_s: float
    place: PeerPlace
    state: SessionState = SessionState.OPEN
