"""Sessions: which are open, who holds each, and when it ends. No streams and no tensors here.

Locks: `Sessions` calls `FairShares` with its lock held, never the other way round. It calls `on_end` (the registry)
and closes streams without its lock, since those take locks of their own. Any thread may call any method, except for
`wait_until_due`, which is for the one `Reaper`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from deconvd.errors import InvalidArgumentError, LostSessionError, UnavailableError
from deconvd_server.residents.tenant import Session, SessionState, Tenant
from deconvd_server.resources.capabilities import (
    NAME_BYTES,
    CapabilityTable,
    is_same_secret,
    new_name,
)
from deconvd_server.resources.fair_shares import FairShares, PeerPlace
from deconvd_server.resources.worker_table import WORKERS

__all__ = ["Reaper", "SessionLimits", "Sessions"]

_log = logging.getLogger(__name__)

_MAX_TENANT_KEY_BYTES = 64
"""Longest tenant key, as the schema says: room for a secret, or a digest of one."""

_MAX_GRACE_S = 5.0
"""Longest time that a session outlives its stream: a client whose stream broke resumes it within a second or two."""

_RETRY_AFTER_S = 1.0
"""How long a client should wait while the server drains: about as long as its successor takes to start."""

_LEAST_PERIOD_S = 0.02
"""How often the reaper looks at most: however short a lease is, it must not keep a processor busy."""

_RESERVED_PART = 16
"""One session in this many is reserved for peers that have none, so that one busy peer cannot keep newcomers out."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How many sessions there may be, and what each gets.

    Attributes:
        sessions_count: How many may be open, for all peers together; see `FairShares`. Each takes some KiB, and no
            thread while it is idle.
        lease_s: How long a session lives without a heartbeat.
        tenant_bytes: How many bytes a tenant may keep, in all its sessions together.
    """

    sessions_count: int
    lease_s: float
    tenant_bytes: int

    @property
    def grace_s(self) -> float:
        """How long a session outlives its stream."""
        return min(self.lease_s, _MAX_GRACE_S)


class Sessions:
    """All sessions of a server. Thread-safe.

    Args:
        on_end: Called with each session that has ended, and whether it was its tenant's last. No lock is held.
        clock: Returns seconds.
    """

    def __init__(
        self,
        limits: SessionLimits,
        on_end: Callable[[Session, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        reserved_count = limits.sessions_count // _RESERVED_PART
        self._shares = FairShares(limits.sessions_count, reserved_count, "sessions")
        self._preempted: list[
            tuple[Session, bool]
        ] = []  # ended, but the reaper has not called `on_end` yet
        self._due = threading.Event()
        self._on_end = on_end
        self._clock = clock
        self._lock = threading.RLock()  # `open` may preempt a session, which takes the lock again
        self._sessions: CapabilityTable[Session] = CapabilityTable()
        self._tenants: CapabilityTable[Tenant] = CapabilityTable()
        self._counts: Counter[Tenant] = Counter()  # of sessions that have not ended
        self._is_draining = False

    def open(
        self,
        tenant_key: bytes,
        close_stream: Callable[[], None],
        peer: str = "",
        identity: str = "",
    ) -> Session:
        """Return a new session. If there are too many, another one is preempted, and its client loses it.

        That is a session in which no tensor has a name, or else, of the peer that has most sessions, the
        one whose heartbeat is oldest. See `FairShares`.

        Args:
            tenant_key: Clients of one identity that send the same key are one tenant. With an empty key and without an
                identity the session is its own tenant.
            close_stream: Closes the stream that holds the session.
            peer: Key of the client's peer, which its sessions are counted by.
            identity: The name that the client has proved; empty for none.

        Raises:
            InvalidArgumentError: The key is too long.
            UnavailableError: There are too many sessions, or the server drains.
        """
        _check_tenant_key(tenant_key)
        with self._lock:  # held throughout: `session` must be set before it can be preempted
            self._check_not_draining()
            place = self._shares.take(peer, lambda: self._preempt(session))
            session = self._add(identity, tenant_key, close_stream, place)
        return session

    def resume(
        self,
        name: bytes,
        tenant_key: bytes,
        close_stream: Callable[[], None],
        identity: str = "",
    ) -> Session:
        """Return a session, which another stream holds from now on. The stream that held it is closed.

        Args:
            tenant_key: The key that the session was opened with. With another key it is not found.
            identity: The client's identity when it opened the session. With another one it is not found.

        Raises:
            InvalidArgumentError: As `get` and `open`.
            LostSessionError: As `get`.
            UnavailableError: The server drains.
        """
        _check_name(name)
        _check_tenant_key(tenant_key)
        with self._lock:
            self._check_not_draining()
            session = self._find(name, identity, tenant_key)
            superseded, session.close_stream = session.close_stream, close_stream
            session.state = SessionState.OPEN
            session.deadline_s = self._lease_end_s()
        superseded()
        return session

    def get(self, name: bytes, identity: str = "") -> Session:
        """Return the session of an identity that has a name.

        Raises:
            InvalidArgumentError: The name has the wrong length.
            LostSessionError: No open session of that identity has that name.
        """
        _check_name(name)
        with self._lock:
            return self._find(name, identity)

    def tenant(self, name: bytes, identity: str = "") -> Tenant | None:
        """Return the tenant of the session of an identity that has a name; None if there is no such session."""
        with self._lock:
            session = self._sessions.get(name, identity)
        return None if session is None else session.tenant

    def heartbeat(self, session: Session) -> None:
        """Renew the lease of a session: its client gave a sign of life."""
        with self._lock:
            if session.state is SessionState.OPEN:
                session.deadline_s = self._lease_end_s()
                session.place.note_progress()

    def mark_broken(self, session: Session, close_stream: Callable[[], None]) -> None:
        """Note that a stream broke. If it held the session, the session can be resumed until its grace period is over.

        Args:
            close_stream: As given to `open` or `resume`: tells which stream broke.
        """
        with self._lock:
            if session.state is SessionState.OPEN and session.close_stream is close_stream:
                session.state = SessionState.BROKEN
                session.deadline_s = self._clock() + self._limits.grace_s

    def end(self, session: Session, close_stream: Callable[[], None]) -> None:
        """End a session whose client closed its stream, if that stream still holds it."""
        with self._lock:
            is_its_end = session.state is SessionState.OPEN and session.close_stream is close_stream
            is_last = is_its_end and self._end(session)
        if is_its_end:
            self._on_end(session, is_last)

    def expire(self) -> None:
        """End the sessions whose time is over, and finish those that were preempted."""
        self._end_until(self._clock())

    def wait_until_due(self, timeout_s: float) -> None:
        """Return when a session was preempted, `wake` was called, or the time is over."""
        self._due.wait(timeout_s)
        self._due.clear()

    def wake(self) -> None:
        """Let `wait_until_due` return."""
        self._due.set()

    def close(self) -> None:
        self._end_until(math.inf)

    def drain(self) -> None:
        """Close all streams, and let no session begin or be resumed. Open sessions live on for their grace period."""
        with self._lock:
            self._is_draining = True
            sessions = self._sessions.values()
        for session in sessions:
            session.close_stream()

    def _end_until(self, deadline_s: float) -> None:
        with self._lock:
            due = [s for s in self._sessions.values() if s.deadline_s <= deadline_s]
            ended, self._preempted = self._preempted, []
            ended += [(session, self._end(session)) for session in due]
        for session, is_last in ended:
            session.close_stream()
            self._on_end(session, is_last)

    @property
    def count(self) -> int:
        """How many sessions have not ended."""
        with self._lock:
            return len(self._sessions)

    def _add(
        self, identity: str, tenant_key: bytes, close_stream: Callable[[], None], place: PeerPlace
    ) -> Session:
        """Return a new session. The caller holds the lock."""
        place.is_idle = True
        tenant = self._find_or_add_tenant(identity, tenant_key)
        session = Session(new_name(), tenant, close_stream, self._lease_end_s(), place)
        self._counts[tenant] += 1
        self._sessions.put(session.name, session, identity)
        return session

    def _preempt(self, session: Session) -> None:
        """End a session, and leave the rest to the reaper: dropping its tensors takes too long for the caller."""
        with self._lock:
            if session.state is not SessionState.ENDED:
                self._preempted.append((session, self._end(session)))
        self.wake()

    def _check_not_draining(self) -> None:
        if self._is_draining:
            raise UnavailableError(
                "the server is draining: it opens and resumes no sessions",
                retry_after_s=_RETRY_AFTER_S,
            )

    def _find(self, name: bytes, identity: str, tenant_key: bytes | None = None) -> Session:
        """Return the session of an identity that has a name and, if given, that tenant key. With the lock held."""
        session = self._sessions.get(name, identity)
        key = b"" if session is None else session.tenant.key
        # compared even if there is no session: the answer takes the same time
        has_key = tenant_key is None or is_same_secret(key, tenant_key)
        if session is None or not has_key:
            raise LostSessionError(
                "session must be one that is open on this server, and the one named is unknown or has ended"
                f"{WORKERS.hint(name)}",
                argument="session",
            )
        return session

    def _find_or_add_tenant(self, identity: str, key: bytes) -> Tenant:
        tenant = self._tenants.get(key, identity) if key or identity else None
        if tenant is None:
            tenant = Tenant(self._limits.tenant_bytes, key, identity)
            if key or identity:
                self._tenants.put(key, tenant, identity)
        return tenant

    def _end(self, session: Session) -> bool:
        """Mark a session as ended, and return whether it was its tenant's last. The caller holds the lock."""
        session.state = SessionState.ENDED
        tenant = session.tenant
        self._sessions.pop(session.name, tenant.identity)
        session.place.free()
        self._counts[tenant] -= 1
        if self._counts[tenant]:
            return False
        del self._counts[tenant]
        if tenant.key or tenant.identity:
            self._tenants.pop(tenant.key, tenant.identity)
        return True

    def _lease_end_s(self) -> float:
        return self._clock() + self._limits.lease_s


def _check_tenant_key(key: bytes) -> None:
    if len(key) > _MAX_TENANT_KEY_BYTES:
        raise InvalidArgumentError(
            f"tenant_key must have at most {_MAX_TENANT_KEY_BYTES} bytes, got {len(key)}",
            argument="tenant_key",
        )


def _check_name(name: bytes) -> None:
    if len(name) != NAME_BYTES:
        raise InvalidArgumentError(
            f"session must be a name of {NAME_BYTES} bytes, got {len(name)} bytes",
            argument="session",
        )


class Reaper:
    """A thread that ends sessions when their time is over.

    Args:
        grace_s: The shortest time from an event in a session to its end. The thread looks about twice as often.
    """

    def __init__(self, sessions: Sessions, grace_s: float) -> None:
        self._sessions = sessions
        self._period_s = max(grace_s / 2, _LEAST_PERIOD_S)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session-reaper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread, and wait for its end."""
        self._stop.set()
        self._sessions.wake()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._sessions.wait_until_due(self._period_s)
                self._sessions.expire()
            except Exception:  # noqa: BLE001 - logged: other sessions must still expire
                _log.exception("ending a session failed")
