"""Who has what: tenants and their sessions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Session", "SessionState", "Tenant"]


@dataclass(frozen=True, eq=False, slots=True)
class Tenant:
    """Those who share a secret, and with it a quota and their tensors.

    Attributes:
        quota_bytes: What it may keep.
        key: What its clients tell; empty if it is one session's own.
    """

    quota_bytes: int
    key: bytes = b""


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

    Attributes:
        name: Its secret name.
        hang_up: Ends the stream that holds it.
        deadline_s: When it ends unless something happens before, on the clock of `Sessions`.
    """

    name: bytes
    tenant: Tenant
    hang_up: Callable[[], None]
    deadline_s: float
    state: SessionState = SessionState.OPEN
