"""Who has what: tenants and their sessions. Guarded by those who own them, see there."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deconvd_server.residents.kept import Kept

__all__ = ["Session", "SessionState", "Tenant"]


@dataclass(eq=False, slots=True)
class Tenant:
    """Those who share a secret, and with it a quota and their tensors.

    Attributes:
        quota_bytes: What it may keep.
        key: What its clients tell; empty if it is one session's own.
        sessions_count: Its sessions that have not ended; `Sessions` counts them.
        used_bytes: What it keeps, wherever that is; the keeper counts it, as the rest here.
        contents: What it sent for a digest, by the digest and the form that it was sent in.
    """

    quota_bytes: int
    key: bytes = b""
    sessions_count: int = 0
    used_bytes: int = 0
    contents: dict[Hashable, Kept] = field(default_factory=dict)

    def has_quota_for(self, size_bytes: int) -> bool:
        """Return whether it may keep so much more."""
        return self.used_bytes + size_bytes <= self.quota_bytes


class SessionState(StrEnum):
    """What has become of a session."""

    OPEN = "open"
    BROKEN = "broken"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Session:
    """What a client's tensors are kept for.

        OPEN <--resume, stream breaks--> BROKEN
        OPEN --stream closed, or lease passed--> ENDED
        BROKEN --not resumed in time--> ENDED

    Attributes:
        name: Its secret name.
        hang_up: Ends the stream that holds it.
        deadline_s: When it ends unless something happens before, on the clock of `Sessions`.
        names: Names of the tensors that are kept for it; the keeper's.
    """

    name: bytes
    tenant: Tenant
    hang_up: Callable[[], None]
    deadline_s: float
    state: SessionState = SessionState.OPEN
    names: set[bytes] = field(default_factory=set)
