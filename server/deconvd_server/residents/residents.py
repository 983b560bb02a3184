"""Everything for resident tensors in one object: sessions, the registry, and the thread that ends sessions."""

from __future__ import annotations

from dataclasses import dataclass

from deconvd_server.call.context import CallContext
from deconvd_server.engine.engine import Engine, Engines
from deconvd_server.residents.registry import ResidentRegistry
from deconvd_server.residents.sessions import Reaper, SessionLimits, Sessions
from deconvd_server.residents.tenant import Session

__all__ = ["ResidentLimits", "Residents"]

_DEVICE_PART = 4
"""By default, resident tensors may take one part in this many of what calls may take of a device's memory."""

_UNLIMITED_BYTES = 2**62
"""More bytes than any machine has."""


@dataclass(frozen=True, slots=True)
class ResidentLimits:
    """How many resident tensors there may be, and how long sessions live.

    Attributes:
        device_bytes: Limit on each device; None for a quarter of what calls may take of its memory.
        host_bytes: How many bytes may be spilled from devices with memory of their own to host memory.
        tenant_bytes: Quota of a tenant; None if only the memory limits it. Then a full tenant evicts its own tensors.
        sessions_count: How many sessions may be open. One peer may have fifteen of sixteen while no other peer asks.
        lease_s: How long a session lives without a heartbeat.
    """

    device_bytes: int | None = None
    host_bytes: int = 0
    tenant_bytes: int | None = None
    sessions_count: int = 256
    lease_s: float = 30.0

    def bytes_on(self, engine: Engine) -> int:
        """Return how many bytes of resident tensors an engine's device may have."""
        budget_bytes = engine.info.budget_bytes
        if self.device_bytes is None:
            return budget_bytes // _DEVICE_PART
        return min(self.device_bytes, budget_bytes)


class Residents:
    """The sessions of a server, and their resident tensors.

    Attributes:
        engines: The engines on whose devices tensors are kept.
        registry: The tensors.
        sessions: The sessions that they belong to.
        tenant_bytes: How many bytes a tenant may keep.
        lease_s: How long a session lives without a heartbeat.
    """

    def __init__(self, engines: Engines, limits: ResidentLimits) -> None:
        self.engines = engines
        self.registry = ResidentRegistry(engines.all, limits.bytes_on, limits.host_bytes)
        all_bytes = sum(map(limits.bytes_on, engines.all))
        if all_bytes and any(engine.info.has_own_memory for engine in engines.all):
            all_bytes += limits.host_bytes
        quota_bytes = _UNLIMITED_BYTES if limits.tenant_bytes is None else limits.tenant_bytes
        self.tenant_bytes = min(quota_bytes, all_bytes)
        self.lease_s = limits.lease_s
        session_limits = SessionLimits(limits.sessions_count, limits.lease_s, quota_bytes)
        self.sessions = Sessions(session_limits, self.registry.end_session)
        self._reaper = Reaper(self.sessions, session_limits.grace_s)

    def join(self, name: bytes, call: CallContext) -> Session:
        """Return the session of a call's identity that has a name, and let the call act for its tenant.

        Raises as `Sessions.get`.
        """
        session = self.sessions.get(name, call.identity)
        call.tenant = session.tenant
        return session

    def drain(self) -> None:
        """Let no session begin, and close the streams that hold sessions: those would not end by themselves."""
        self.sessions.drain()

    def close(self) -> None:
        """End all sessions, and drop all tensors. No call may be running."""
        self._reaper.close()
        self.sessions.close()
