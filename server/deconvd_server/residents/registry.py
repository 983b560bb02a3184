"""The registry of resident tensors: which there are, for whom, and by which names.

Locks: one lock (`_changed`) guards the registry, its `Placement` and all entries, tiers and quotas. It is taken
alone: nothing that has a lock of its own (devices, engines, sessions) is called with it held. `Sessions` calls
`end_session` without its lock. Calls may use every other method, in their own threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Final, TypeVar

from deconvd.errors import (
    ExhaustedError,
    LostSessionError,
    LostTensorError,
)
from deconvd.model.problem import TensorSpec
from deconvd.wire.cache_state import CacheState
from deconvd_server.call.context import CallContext
from deconvd_server.device import Tensor
from deconvd_server.engine.engine import Engine
from deconvd_server.residents.elements import check_not_freed
from deconvd_server.residents.entry import ResidentEntry
from deconvd_server.residents.placement import Placement
from deconvd_server.residents.quotas import Quotas, counted_bytes, names_limit
from deconvd_server.residents.tenant import Session, SessionState, Tenant
from deconvd_server.residents.uses import ResidentUse
from deconvd_server.resources.capabilities import CapabilityTable
from deconvd_server.resources.shared_quotas import QUOTA_SHARING
from deconvd_server.resources.worker_table import WORKERS

__all__ = ["ResidentRegistry"]

_POLL_PERIOD_S = 0.05
"""How often a thread that waits for a moving tensor checks whether its call is still wanted."""

_BATCH_COUNT: Final = 64
"""Largest number of names or contents handled while the lock is held: others wait for less than a millisecond."""

_MOST_TRIES_COUNT: Final = 8
"""How often room in a quota is made that somebody else takes at once."""

_T = TypeVar("_T")


class ResidentRegistry:
    """The resident tensors of all sessions. A tenant's sessions share its tensors. Thread-safe.

    Who gets an entry from it is a user of that entry, and must `release` it. Until then the tensor stays
    where it is, even if it is dropped, except while its users `rest`. A tensor that has neither a name
    nor a content is freed after its last user. Work on many tensors is done in batches, and the lock is
    released between them.

    Args:
        engines: The engines on whose devices tensors are kept.
        limit_bytes: Returns how many bytes of tensors an engine's device may have.
        host_bytes: How many bytes may be spilled to host memory.
    """

    def __init__(
        self, engines: Sequence[Engine], limit_bytes: Callable[[Engine], int], host_bytes: int
    ) -> None:
        self._changed = threading.Condition()
        self._names: CapabilityTable[ResidentEntry] = CapabilityTable()
        self._names_by_session: dict[Session, set[bytes]] = {}
        # tensors that can be named by their content: the key is the digest and the TensorSpec
        self._contents: dict[Tenant, dict[Hashable, ResidentEntry]] = {}
        self._quotas = Quotas(QUOTA_SHARING.quotas)
        self._placement = Placement(
            engines,
            self._changed,
            self._quotas,
            self._forget,
            limit_bytes=limit_bytes,
            host_bytes=host_bytes,
        )
        QUOTA_SHARING.start_serving(self.give_room)

    def names_of(self, session: Session) -> frozenset[bytes]:
        """Return all names of a session."""
        with self._changed:
            return frozenset(self._names_by_session.get(session, ()))

    def used_bytes(self, tenant: Tenant) -> int:
        """Return how many bytes of its quota a tenant uses."""
        with self._changed:
            return self._quotas.used_bytes(tenant)

    def make(
        self, session: Session, spec: TensorSpec, engine: Engine, call: CallContext
    ) -> ResidentEntry:
        """Return a new tensor on an engine's device, with undefined elements. The caller is its user.

        It has no name yet: unless `bind_name` or `register_content` is called, `release` frees it.

        Raises:
            LostSessionError: The session has ended.
            ExhaustedError: There is no room in the tenant's quota, or in the memory for resident tensors.
            UnavailableError: Calls use the memory now.
        """
        size_bytes = counted_bytes(spec)
        self._take_quota(session, size_bytes, call)
        try:
            return self._placement.make(session.tenant, spec, engine, call)
        except BaseException:
            with self._changed:
                self._quotas.give_back(session.tenant, size_bytes)
            raise

    def bind_name(self, entry: ResidentEntry, session: Session, name: bytes) -> None:
        """Bind a new name to a tensor that the caller uses. The name lasts until the session ends.

        Raises:
            LostSessionError: The session has ended.
            UnavailableError: As `check_not_freed`.
            ExhaustedError: The tensor has as many names as it may.
        """
        with self._changed:
            _check_alive(session)
            check_not_freed(entry)
            if not entry.is_live:
                raise RuntimeError("a dropped tensor cannot get a name")
            if len(entry.names) >= names_limit(entry.spec):
                raise ExhaustedError(
                    f"a tensor of {entry.spec.nbytes} bytes may have at most {names_limit(entry.spec)} handles at "
                    "once: drop some of them"
                )
            self._names.put(name, entry, entry.tenant)
            self._names_by_session.setdefault(session, set()).add(name)
            session.place.is_idle = False
            entry.names[name] = session

    def register_content(
        self, entry: ResidentEntry, session: Session, content_key: Hashable
    ) -> None:
        """Let a tensor that the caller uses be found by its content, until the tenant's last session ends.

        Nothing happens if the content is registered already, or if the session has ended.
        """
        with self._changed:
            if session.state is SessionState.ENDED:
                return
            contents = self._contents.setdefault(session.tenant, {})
            if content_key not in contents:
                contents[content_key] = entry
                entry.content_key = content_key
                entry.tier.note_miss(session.tenant)

    def drop(self, session: Session, names: Iterable[bytes]) -> None:
        """Remove names of a session. Names that it does not have are ignored."""
        for batch in _batches(names):
            with self._changed:
                for name in self._names_by_session.get(session, set()).intersection(batch):
                    self._drop_name(name, session.tenant)
            self._placement.sweep()

    def end_session(self, session: Session, is_last: bool) -> None:
        """Drop all tensors of a session that has ended; if it was its tenant's last, its tenant's contents, too."""
        with self._changed:
            names = tuple(self._names_by_session.get(session, ()))
        self.drop(session, names)
        with self._changed:
            self._names_by_session.pop(session, None)
            contents = self._contents_of(session.tenant) if is_last else ()
        for batch in _batches(contents):
            with self._changed:
                for entry in batch:
                    self._forget_content(entry)
                    _retire_if_unnamed(entry)
            self._placement.sweep()
        if is_last:
            with self._changed:
                self._contents.pop(session.tenant, None)

    def acquire_by_name(
        self, session: Session, name: bytes, argument: str, call: CallContext
    ) -> ResidentEntry:
        """Return the tensor that has a name. The caller is its user.

        Args:
            argument: The argument that the tensor is for, named in errors.

        Raises:
            LostTensorError: No tensor of the session's tenant has that name.
        """

        def find() -> ResidentEntry | None:
            return self._names.get(name, session.tenant)

        entry = self._acquire(find, call)
        if entry is None:
            raise LostTensorError(
                f"{argument} must be a tensor that this server still has, and the one named is unknown, was "
                f"dropped, or was evicted to make room{WORKERS.hint(name)}",
                argument=argument,
            )
        return entry

    def acquire_by_content(
        self, session: Session, content_key: Hashable, call: CallContext
    ) -> ResidentEntry | None:
        """Return the tensor that has a content, or None if there is none. The caller is its user."""

        def find() -> ResidentEntry | None:
            return self._contents.get(session.tenant, {}).get(content_key)

        entry = self._acquire(find, call)
        with self._changed:
            if entry is not None and entry.content_key is not None:
                contents = self._contents[session.tenant]
                # to the end: the least recently used come first
                contents[content_key] = contents.pop(content_key)
        return entry

    def release(self, entry: ResidentEntry) -> None:
        """End a use of a tensor."""
        with self._changed:
            entry.release()
            if not entry.users_count:
                _retire_if_unnamed(entry)
        self._placement.sweep()

    def begin_use(self, call: CallContext) -> ResidentUse:
        """Return a list for the tensors that a call uses. `end_use` releases them."""
        return self._placement.uses.begin(call)

    def end_use(self, use: ResidentUse) -> None:
        """Release all tensors of a call."""
        self._placement.uses.end(use)
        for entry in use.tensors:
            self.release(entry)

    def rest(self, entry: ResidentEntry, call: CallContext) -> AbstractContextManager[None]:
        """Let the caller, a user of a tensor, rest for the length of a block in which it waits for its client.

        Meanwhile the tensor may be evicted if another tenant needs the memory within its share. After the
        block the tensor may be in another tier, or freed: see `check_not_freed`.
        """
        return _RestScope(self._changed, entry, call)

    def operand(self, entry: ResidentEntry, engine: Engine, call: CallContext) -> Tensor:
        """Return the elements of a tensor that the caller uses. See `Placement.operand`."""
        return self._placement.operand(entry, engine, call)

    def cache_states(self, engine: Engine, tenant: Tenant | None) -> list[CacheState]:
        """Return what a tenant has on an engine's device, and of it in host memory; zeros if the tenant is None."""
        return self._placement.cache_states(engine, tenant)

    def whole_states(self) -> dict[str, CacheState]:
        """Return what all tenants together have on each device, by its id, and on the ``host`` if it takes any."""
        return self._placement.whole_states()

    def _acquire(
        self, find: Callable[[], ResidentEntry | None], call: CallContext
    ) -> ResidentEntry | None:
        """Return what `find` returns, with one more user, after waiting until it is not being moved.

        `find` is called again after each wait: a tensor may be dropped while it is moved.
        """
        with self._changed:
            while (entry := find()) is not None and entry.is_moving:
                self._changed.wait(_POLL_PERIOD_S)
                call.check()
            if entry is not None:
                entry.acquire()
            return entry

    def give_room(self, owner: bytes, size_bytes: int, is_wanted: Callable[[], bool]) -> None:
        """Drop tensors for another process, until an owner's quota has room there: those with a content but no name.

        Args:
            owner: The `Tenant.shared_key` of tenants.
            is_wanted: Returns whether the other process still wants the room.
        """
        with self._changed:
            tenants = [tenant for tenant in self._contents if tenant.shared_key == owner]
            contents = [entry for tenant in tenants for entry in self._contents_of(tenant)]

        def is_enough() -> bool:
            # in this order: before the other process takes the room, it says that it wants no more
            return self._quotas.have_room(tenants[0], size_bytes) or not is_wanted()

        for batch in _batches(contents):
            with self._changed:
                for entry in batch:
                    if is_enough():  # again each time: others may make room, too, or take it
                        break
                    self._drop_if_idle(entry)
            self._placement.sweep()
            if is_enough():
                return

    def _take_quota(self, session: Session, size_bytes: int, call: CallContext) -> None:
        """Charge bytes to the quota of a session's tenant, for which other processes may have to make room, too."""
        tenant = session.tenant
        for _ in range(_MOST_TRIES_COUNT):
            if self._take_own_quota(session, size_bytes):
                return
            can_ever_fit = size_bytes <= tenant.quota_bytes
            if not (tenant.shared_key and can_ever_fit) or not QUOTA_SHARING.request_room(
                tenant.shared_key,
                size_bytes,
                lambda: self._quotas.have_room(tenant, size_bytes),
                call.check,
            ):
                break
        raise ExhaustedError(
            f"a tenant may keep {tenant.quota_bytes} bytes of resident tensors, and this one keeps "
            f"{self.used_bytes(tenant)}: {size_bytes} more are over its quota"
        )

    def _take_own_quota(self, session: Session, size_bytes: int) -> bool:
        """Charge bytes to the quota of a session's tenant, as far as this process can. Return whether it could.

        If the quota is full, tensors that have a content but no name are dropped, the least recently used
        first: the client can send those again. These are the tenant's own, and those of tenants of the same
        identity that use more than their part of its quota.
        """
        tenant = session.tenant
        contents: Iterator[ResidentEntry] | None = None
        while True:
            with self._changed:
                _check_alive(session)
                if self._quotas.take(tenant, size_bytes):
                    return True
                if contents is None:
                    contents = iter(self._droppable_for(tenant, size_bytes))
                batch = tuple(islice(contents, _BATCH_COUNT))
                if not batch or size_bytes > tenant.quota_bytes:
                    return False
                for entry in batch:
                    if self._quotas.have_room(tenant, size_bytes):
                        break
                    if entry.tenant is not tenant and not self._quotas.exceeds_part(
                        entry.tenant, tenant
                    ):
                        continue
                    self._drop_if_idle(entry)
            self._placement.sweep()

    def _drop_if_idle(self, entry: ResidentEntry) -> bool:
        """Drop a tensor that has a content, unless it has a name or a user, for others of its owner. Return whether."""
        if not entry.is_idle or entry.names:
            return False
        entry.tier.note_eviction(entry.tenant)
        self._placement.drop(entry)
        return True

    def _droppable_for(self, tenant: Tenant, size_bytes: int) -> Sequence[ResidentEntry]:
        """Return the tensors with a content that may make room in the quota of a tenant, in this order.

        A tenant that stays within its part of the quota keeps its own as long as it can.
        """
        own = self._contents_of(tenant)
        if not tenant.identity:
            return own
        siblings = [
            other
            for other in self._contents
            if other.identity == tenant.identity and other is not tenant
        ]
        theirs = [entry for other in siblings for entry in self._contents_of(other)]
        if self._quotas.is_within_part(tenant, size_bytes):
            return [*theirs, *own]
        return [*own, *theirs]

    def _contents_of(self, tenant: Tenant) -> tuple[ResidentEntry, ...]:
        """Return the tensors of a tenant that have a content, the least recently found first."""
        return tuple(self._contents.get(tenant, {}).values())

    def _forget(self, entry: ResidentEntry) -> None:
        """Remove all names of a tensor, and its content."""
        for name in tuple(entry.names):
            self._forget_name(name, entry.tenant)
        self._forget_content(entry)

    def _forget_name(self, name: bytes, tenant: Tenant) -> ResidentEntry:
        entry = self._names.pop(name, tenant)
        session = entry.names.pop(name)
        names = self._names_by_session[session]
        names.remove(name)
        session.place.is_idle = not names
        return entry

    def _forget_content(self, entry: ResidentEntry) -> None:
        if entry.content_key is not None:
            del self._contents[entry.tenant][entry.content_key]
            entry.content_key = None

    def _drop_name(self, name: bytes, tenant: Tenant) -> None:
        _retire_if_unnamed(self._forget_name(name, tenant))


class _RestScope(AbstractContextManager[None]):
    """Lets a user rest for the length of a block. See `ResidentRegistry.rest`."""

    __slots__ = ("_call", "_changed", "_entry")

    def __init__(
        self, changed: threading.Condition, entry: ResidentEntry, call: CallContext
    ) -> None:
        self._changed = changed
        self._entry = entry
        self._call = call

    def __enter__(self) -> None:
        with self._changed:
            self._entry.rest()

    def __exit__(self, error: object, *_: object) -> None:
        with self._changed:
            # a moving tensor is about to change its elements' place: go on only after that
            while error is None and self._entry.is_moving and not self._call.is_cancelled:
                self._changed.wait(_POLL_PERIOD_S)
            self._entry.resume()


def _batches(items: Iterable[_T]) -> Iterator[tuple[_T, ...]]:
    """Yield items in tuples of at most `_BATCH_COUNT`."""
    rest = iter(items)
    while batch := tuple(islice(rest, _BATCH_COUNT)):
        yield batch


def _retire_if_unnamed(entry: ResidentEntry) -> None:
    if not entry.names and entry.content_key is None:
        entry.retire()


def _check_alive(session: Session) -> None:
    # Reads the state without the lock of `Sessions`. That is safe: `Sessions` sets the state first and
    # calls `end_session` then, which drops whatever got a name in between.
    if session.state is SessionState.ENDED:
        raise LostSessionError(
            "session must be one that is open on this server, and this one has ended",
            argument="session",
        )
