"""Sessions: who holds one, and when it ends. No streams here, and no tensors."""

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

__all__ = ["Reaper", "SessionLimits", "Sessions"]

_log = logging.getLogger(__name__)

_MAX_TENANT_KEY_BYTES = 64
"""As the schema says: secrets, or digests of secrets."""

_MAX_GRACE_S = 5.0
"""How long a session outlives its stream at most: a client whose stream broke resumes it within a second or two."""

_RETRY_AFTER_S = 1.0
"""What clients are told while the server drains: about as long as another takes to start in its place."""

_RESERVED_PART = 16
"""One session in so many is for peers that have none: whoever has all the others cannot keep a newcomer waiting."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """How many sessions there may be, and what each gets.

    Attributes:
        sessions_count: How many, of all peers together; see `Shares`. Each takes some KiB, and no thread
            while it is idle.
        lease_s: How long one outlives its client's last sign of life.
        tenant_bytes: What a tenant may keep, in all its sessions together.
    """

    sessions_count: int
    lease_s: float
    tenant_bytes: int

    @property
    def grace_s(self) -> float:
        """How long a session outlives its stream."""
        return min(self.lease_s, _MAX_GRACE_S)


class Sessions:
    """All sessions. Thread-safe.

    Args:
        on_end: Called, outside the lock, with each session that has ended and whether it was its
            tenant's last.
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
        self._preempted: list[tuple[Session, bool]] = []  # ended, though `on_end` is not called yet
        self._due = threading.Event()
        self._on_end = on_end
        self._clock = clock
        self._lock = threading.RLock()  # one session's opening may be another's end
        self._sessions: CapabilityTable[Session] = CapabilityTable()
        self._tenants: CapabilityTable[Tenant] = CapabilityTable()
        self._counts: Counter[Tenant] = Counter()  # of sessions that have not ended
        self._is_draining = False

    def open(self, tenant_key: bytes, hang_up: Callable[[], None], peer: str = "") -> Session:
        """Return a new session. Where there are too many, another may give way to it, and is lost then.

        That is one in which nothing has a name, or else, of the peer that has most, the one that gave no
        sign of life for longest. See `Shares`.

        Args:
            tenant_key: What all who tell it are one tenant by; empty for a tenant of its own.
            hang_up: Ends the stream that holds the session.
            peer: By what its client is counted.

        Raises:
            InvalidArgumentError: The key is too long.
            UnavailableError: There are too many sessions, or the server drains.
        """
        _check_tenant_key(tenant_key)
        with self._lock:  # so that the session is there before it can have to give way
            self._check_not_draining()
            place = self._shares.take(peer, lambda: self._preempt(session))
            session = self._add(tenant_key, hang_up, place)
        return session

    def resume(self, name: bytes, tenant_key: bytes, hang_up: Callable[[], None]) -> Session:
        """Return a session, now held by another stream; the one that held it is hung up.

        Args:
            tenant_key: What the session was opened with: to others there is no such session.

        Raises:
            InvalidArgumentError: As `get` and `open`.
            LostSessionError: As `get`.
            UnavailableError: The server drains.
        """
        _check_name(name)
        _check_tenant_key(tenant_key)
        with self._lock:
            self._check_not_draining()
            session = self._find(name, tenant_key)
            superseded, session.close_stream = session.close_stream, hang_up
            session.state = SessionState.OPEN
            session.deadline_s = self._lease_end_s()
        superseded()
        return session

    def get(self, name: bytes) -> Session:
        """Return the session of a name.

        Raises:
            InvalidArgumentError: It is no name.
            LostSessionError: There is none, or no longer.
        """
        _check_name(name)
        with self._lock:
            return self._find(name)

    def tenant(self, name: bytes) -> Tenant | None:
        """Return the tenant of the session of a name; None if there is no such session."""
        with self._lock:
            session = self._sessions.get(name)
        return None if session is None else session.tenant

    def heartbeat(self, session: Session) -> None:
        """Note that the client of a session is there."""
        with self._lock:
            if session.state is SessionState.OPEN:
                session.deadline_s = self._lease_end_s()
                session.place.note_progress()

    def mark_broken(self, session: Session, hang_up: Callable[[], None]) -> None:
        """Note that a stream broke: the session may be resumed for a while, if that stream held it.

        Args:
            hang_up: The stream's, as given to `open` or `resume`.
        """
        with self._lock:
            if session.state is SessionState.OPEN and session.close_stream is hang_up:
                session.state = SessionState.BROKEN
                session.deadline_s = self._clock() + self._limits.grace_s

    def end(self, session: Session, hang_up: Callable[[], None]) -> None:
        """End a session whose client closed the stream that held it."""
        with self._lock:
            is_its_end = session.state is SessionState.OPEN and session.close_stream is hang_up
            is_last = is_its_end and self._end(session)
        if is_its_end:
            self._on_end(session, is_last)

    def expire(self) -> None:
        """End the sessions whose time has come, or that had to give way."""
        self._end_until(self._clock())

    def wait_until_due(self, timeout_s: float) -> None:
        """Return once a session had to give way, `wake` was called, or the time is up."""
        self._due.wait(timeout_s)
        self._due.clear()

    def wake(self) -> None:
        """Let `wait_until_due` return."""
        self._due.set()

    def close(self) -> None:
        """End all sessions."""
        self._end_until(math.inf)

    def drain(self) -> None:
        """Hang up all streams, and let no session begin or be resumed. Those there are live on for a while."""
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
        """Sessions that have not ended."""
        with self._lock:
            return len(self._sessions)

    def _add(self, tenant_key: bytes, hang_up: Callable[[], None], place: PeerPlace) -> Session:
        """Return a new session, under the lock."""
        place.is_idle = True
        tenant = self._find_or_add_tenant(tenant_key)
        session = Session(new_name(), tenant, hang_up, self._lease_end_s(), place)
        self._counts[tenant] += 1
        self._sessions.put(session.name, session)
        return session

    def _preempt(self, session: Session) -> None:
        """End a session, and have another thread clear up after it."""
        with self._lock:
            if session.state is not SessionState.ENDED:
                self._preempted.append((session, self._end(session)))
        self.wake()

    def _check_not_draining(self) -> None:
        if self._is_draining:
            raise UnavailableError(
                "the server is draining: it takes no sessions", retry_after_s=_RETRY_AFTER_S
            )

    def _find(self, name: bytes, tenant_key: bytes | None = None) -> Session:
        """Return the session of a name, under the lock; if a key is given, only one that was opened with it."""
        session = self._sessions.get(name)
        key = b"" if session is None else session.tenant.key
        if session is None or (tenant_key is not None and not is_same_secret(key, tenant_key)):
            raise LostSessionError(
                "session must be one that this server holds, and the one named is unknown or has ended",
                argument="session",
            )
        return session

    def _find_or_add_tenant(self, key: bytes) -> Tenant:
        tenant = self._tenants.get(key) if key else None
        if tenant is None:
            tenant = Tenant(self._limits.tenant_bytes, key)
            if key:
                self._tenants.put(key, tenant)
        return tenant

    def _end(self, session: Session) -> bool:
        """Note that a session has ended; return whether it was its tenant's last."""
        session.state = SessionState.ENDED
        self._sessions.pop(session.name)
        session.place.free()
        tenant = session.tenant
        self._counts[tenant] -= 1
        if self._counts[tenant]:
            return False
        del self._counts[tenant]
        if tenant.key:
            self._tenants.pop(tenant.key)
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
            f"session must be a name of {NAME_BYTES} bytes, got {len(name)}", argument="session"
        )


class Reaper:
    """A thread that ends sessions when their time has come.

    Args:
        grace_s: The least time that a session has ahead when something happens to it.
    """

    def __init__(self, sessions: Sessions, grace_s: float) -> None:
        self._sessions = sessions
        self._period_s = grace_s / 2
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="session-reaper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        self._sessions.wake()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._sessions.wait_until_due(self._period_s)
                self._sessions.expire()
            except Exception:  # noqa: BLE001 - logged: other sessions must still expire
                _log.exception("a session could not be ended in good order")
