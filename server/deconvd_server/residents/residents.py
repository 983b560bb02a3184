"""All that has to do with tensors that stay: sessions, what is kept for them, and the thread that ends them."""

from __future__ import annotations

from dataclasses import dataclass

from deconvd_server.call.context import CallContext
from deconvd_server.engine.engine import Engine, Engines
from deconvd_server.residents.registry import ResidentRegistry
from deconvd_server.residents.sessions import Reaper, SessionLimits, Sessions
from deconvd_server.residents.tenant import Session

__all__ = ["ResidentLimits", "Residents"]

_DEVICE_PART = 4
"""Unless told, tensors may take one part in so many of what calls may take of a device's memory."""

_UNLIMITED_BYTES = 2**62
"""More than there is."""


@dataclass(frozen=True, slots=True)
class ResidentLimits:
    """How much may stay, and for how long.

    Attributes:
        device_bytes: On each device; None for a quarter of what calls may take.
        host_bytes: In host memory, of what devices with memory of their own have no room for.
        tenant_bytes: The quota of a tenant; None for none: what it keeps then makes room for itself.
        sessions_count: Sessions at once; one peer may have fifteen of sixteen while no other asks.
        lease_s: How long a session outlives its client's last sign of life.
    """

    device_bytes: int | None = None
    host_bytes: int = 0
    tenant_bytes: int | None = None
    sessions_count: int = 256
    lease_s: float = 30.0

    def bytes_on(self, engine: Engine) -> int:
        """Return what may stay on an engine's device."""
        budget_bytes = engine.info.budget_bytes
        if self.device_bytes is None:
            return budget_bytes // _DEVICE_PART
        return min(self.device_bytes, budget_bytes)


class Residents:
    """The sessions of a server, and the tensors that stay for them.

    Attributes:
        engines: Whose devices they stay on.
        sessions: Those who hold them.
        keeper: What is kept.
        tenant_bytes: What a tenant may keep.
        lease_s: How long a session outlives its client's last sign of life.
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
        """Return the session of a name, on whose tenant's behalf a call is from now on. Raises as `Sessions.get`."""
        session = self.sessions.get(name)
        call.tenant = session.tenant
        return session

    def drain(self) -> None:
        """Let no session begin, and hang up the streams that hold them, which would not end by themselves."""
        self.sessions.drain()

    def close(self) -> None:
        """End all sessions, and with them all that is kept. No call may be under way."""
        self._reaper.close()
        self.sessions.close()
