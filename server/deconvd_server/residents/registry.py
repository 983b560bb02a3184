"""The keeper of tensors: what is kept, for whom, and by which names."""

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

__all__ = ["ResidentRegistry"]

_POLL_PERIOD_S = 0.05
"""How often one who waits for a tensor on its way looks whether its call is still wanted."""

_BATCH_COUNT: Final = 64
"""Names or contents that are looked at while the lock is held: others wait for less than a millisecond."""

_T = TypeVar("_T")


class ResidentRegistry:
    """Keeps tensors for sessions, each of a tenant's for all of the tenant's sessions. Thread-safe.

    Whoever gets a tensor from it is its user, and ends that by `release`: until then it stays where
    it is, whatever is dropped, but while its users are `resting`. What nothing stands for is freed
    after its last user. Whatever concerns many tensors is done in steps, between which the lock is
    free.

    Args:
        engines: Whose devices tensors are kept on.
        limit_bytes: Returns what may be kept on an engine's device.
        host_bytes: What may be kept in host memory of what devices with memory of their own have no
            room for.
    """

    def __init__(
        self, engines: Sequence[Engine], limit_bytes: Callable[[Engine], int], host_bytes: int
    ) -> None:
        self._changed = threading.Condition()
        self._names: CapabilityTable[ResidentEntry] = CapabilityTable()
        self._names_by_session: dict[Session, set[bytes]] = {}
        # what tenants sent for a digest, by the digest and the form that it was sent in
        self._contents: dict[Tenant, dict[Hashable, ResidentEntry]] = {}
        self._quotas = Quotas()
        self._placement = Placement(
            engines,
            self._changed,
            self._quotas,
            self._forget,
            limit_bytes=limit_bytes,
            host_bytes=host_bytes,
        )

    def names_of(self, session: Session) -> frozenset[bytes]:
        """Return the names of the tensors that are kept for a session."""
        with self._changed:
            return frozenset(self._names_by_session.get(session, ()))

    def used_bytes(self, tenant: Tenant) -> int:
        """Return what is kept for a tenant, wherever that is."""
        with self._changed:
            return self._quotas.used_bytes(tenant)

    def make(
        self, session: Session, spec: TensorSpec, engine: Engine, call: CallContext
    ) -> ResidentEntry:
        """Return a new tensor on an engine's device, with any elements. The caller is its user.

        Nothing stands for it: unless `name` or `offer` lets something, `release` frees it.

        Raises:
            LostSessionError: The session has ended.
            ExhaustedError: The tenant's quota, or the memory for tensors that stay, has no room.
            UnavailableError: Calls take the memory now.
        """
        size_bytes = counted_bytes(spec)
        self._take_quota(session, size_bytes)
        try:
            return self._placement.make(session.tenant, spec, engine, call)
        except BaseException:
            with self._changed:
                self._quotas.give_back(session.tenant, size_bytes)
            raise

    def bind_name(self, kept: ResidentEntry, session: Session, name: bytes) -> None:
        """Let a new name stand for a tensor that the caller uses, until the session ends.

        Raises:
            LostSessionError: It has ended.
            UnavailableError: As `check_not_freed`.
            ExhaustedError: The tensor has as many names as it may.
        """
        with self._changed:
            _check_alive(session)
            check_not_freed(kept)
            if not kept.is_live:
                raise RuntimeError("a tensor that is dropped cannot be named")
            if len(kept.names) >= names_limit(kept.spec):
                raise ExhaustedError(
                    f"a tensor of {kept.spec.nbytes} bytes may have {names_limit(kept.spec)} handles "
                    "at once: drop some of them"
                )
            self._names.put(name, kept)
            self._names_by_session.setdefault(session, set()).add(name)
            session.place.is_idle = False
            kept.names[name] = session

    def register_content(
        self, kept: ResidentEntry, session: Session, content_key: Hashable
    ) -> None:
        """Let content stand for a tensor that the caller uses, until the tenant's last session ends.

        Nothing changes if it stands for one already, or if the session has ended.
        """
        with self._changed:
            if session.state is SessionState.ENDED:
                return
            contents = self._contents.setdefault(session.tenant, {})
            if content_key not in contents:
                contents[content_key] = kept
                kept.content_key = content_key
                session.tenant.misses[kept.tier] += 1

    def drop(self, session: Session, names: Iterable[bytes]) -> None:
        """Let names of a session stand for nothing. Those that it does not have are passed over."""
        for step in _batches(names):
            with self._changed:
                for name in self._names_by_session.get(session, set()).intersection(step):
                    self._drop_name(name)
            self._placement.sweep()

    def end_session(self, session: Session, is_last: bool) -> None:
        """Drop what was kept for a session that has ended, and its tenant's contents if it was the last."""
        with self._changed:
            names = tuple(self._names_by_session.get(session, ()))
        self.drop(session, names)
        with self._changed:
            self._names_by_session.pop(session, None)
            contents = self._contents_of(session.tenant) if is_last else ()
        for step in _batches(contents):
            with self._changed:
                for kept in step:
                    self._forget_content(kept)
                    _retire_if_unnamed(kept)
            self._placement.sweep()
        if is_last:
            with self._changed:
                self._contents.pop(session.tenant, None)

    def acquire_by_name(
        self, session: Session, name: bytes, argument: str, call: CallContext
    ) -> ResidentEntry:
        """Return the tensor of a name. The caller is its user.

        Args:
            argument: Which argument it is for, for errors.

        Raises:
            LostTensorError: There is none that the session's tenant may use.
        """

        def find() -> ResidentEntry | None:
            kept = self._names.get(name)
            return kept if kept is not None and kept.tenant is session.tenant else None

        kept = self._acquire(find, call)
        if kept is None:
            raise LostTensorError(
                f"{argument} must be kept by this server, and the tensor named is unknown, was "
                "dropped, or had to make room",
                argument=argument,
            )
        return kept

    def acquire_by_content(
        self, session: Session, content_key: Hashable, call: CallContext
    ) -> ResidentEntry | None:
        """Return the tensor of a content, or None. The caller is its user."""

        def find() -> ResidentEntry | None:
            return self._contents.get(session.tenant, {}).get(content_key)

        kept = self._acquire(find, call)
        with self._changed:
            if kept is not None and kept.content_key is not None:
                contents = self._contents[session.tenant]
                contents[content_key] = contents.pop(content_key)  # the oldest come first
        return kept

    def release(self, kept: ResidentEntry) -> None:
        """Use a tensor no more."""
        with self._changed:
            kept.release()
            if not kept.users_count:
                _retire_if_unnamed(kept)
        self._placement.sweep()

    def begin_use(self, call: CallContext) -> ResidentUse:
        """Return what a call notes the tensors in that it uses, to be ended by `end_use`."""
        return self._placement.uses.begin(call)

    def end_use(self, use: ResidentUse) -> None:
        """Use the tensors of a call no more."""
        self._placement.uses.end(use)
        for kept in use.tensors:
            self.release(kept)

    def rest(self, kept: ResidentEntry, call: CallContext) -> AbstractContextManager[None]:
        """Let the caller, a user of a tensor, not use it for the block, in which it waits for its client.

        Another tenant may have the tensor's memory then, as far as that is promised to it. After the block
        the tensor may be elsewhere, or gone: see `check_not_freed`.
        """
        return _RestScope(self._changed, kept, call)

    def operand(self, kept: ResidentEntry, engine: Engine, call: CallContext) -> Tensor:
        """Return the elements of a tensor that the caller uses. See `Shelving.operand`."""
        return self._placement.operand(kept, engine, call)

    def cache_states(self, engine: Engine, tenant: Tenant | None) -> list[CacheState]:
        """Return what is kept for a tenant on an engine's device now, and beneath it; nothing for None."""
        return self._placement.cache_states(engine, tenant)

    def _acquire(
        self, find: Callable[[], ResidentEntry | None], call: CallContext
    ) -> ResidentEntry | None:
        """Return what is found, with one more user, once it is not on its way elsewhere."""
        with self._changed:
            while (kept := find()) is not None and kept.is_moving:
                self._changed.wait(_POLL_PERIOD_S)
                call.check()
            if kept is not None:
                kept.acquire()
            return kept

    def _take_quota(self, session: Session, size_bytes: int) -> None:
        """Count bytes as kept for a session's tenant.

        What content alone stands for can be sent again: it makes room, the oldest first.
        """
        tenant = session.tenant
        contents: Iterator[ResidentEntry] | None = None
        while True:
            with self._changed:
                _check_alive(session)
                if self._quotas.have_room(tenant, size_bytes):
                    self._quotas.take(tenant, size_bytes)
                    return
                if contents is None:
                    contents = iter(self._contents_of(tenant))
                step = tuple(islice(contents, _BATCH_COUNT))
                if not step or size_bytes > tenant.quota_bytes:
                    raise ExhaustedError(
                        f"a tenant may keep {tenant.quota_bytes} bytes of tensors, and this one keeps "
                        f"{self._quotas.used_bytes(tenant)}: {size_bytes} more are over its quota"
                    )
                for kept in step:
                    if self._quotas.have_room(tenant, size_bytes):
                        break
                    if kept.is_idle and not kept.names:
                        self._placement.drop(kept)
            self._placement.sweep()

    def _contents_of(self, tenant: Tenant) -> tuple[ResidentEntry, ...]:
        """Return what content stands for, the least recently found first."""
        return tuple(self._contents.get(tenant, {}).values())

    def _forget(self, kept: ResidentEntry) -> None:
        """Let nothing stand for a tensor."""
        for name in tuple(kept.names):
            self._forget_name(name)
        self._forget_content(kept)

    def _forget_name(self, name: bytes) -> ResidentEntry:
        kept = self._names.pop(name)
        session = kept.names.pop(name)
        names = self._names_by_session[session]
        names.remove(name)
        session.place.is_idle = not names
        return kept

    def _forget_content(self, kept: ResidentEntry) -> None:
        if kept.content_key is not None:
            del self._contents[kept.tenant][kept.content_key]
            kept.content_key = None

    def _drop_name(self, name: bytes) -> None:
        _retire_if_unnamed(self._forget_name(name))


class _RestScope(AbstractContextManager[None]):
    """A user that rests, for the length of a block. See `Keeper.resting`."""

    __slots__ = ("_call", "_changed", "_entry")

    def __init__(
        self, changed: threading.Condition, kept: ResidentEntry, call: CallContext
    ) -> None:
        self._changed = changed
        self._entry = kept
        self._call = call

    def __enter__(self) -> None:
        with self._changed:
            self._entry.rest()

    def __exit__(self, error: object, *_: object) -> None:
        with self._changed:
            while error is None and self._entry.is_moving and not self._call.is_cancelled:
                self._changed.wait(_POLL_PERIOD_S)
            self._entry.resume()


def _batches(items: Iterable[_T]) -> Iterator[tuple[_T, ...]]:
    """Yield items, a few at a time."""
    rest = iter(items)
    while step := tuple(islice(rest, _BATCH_COUNT)):
        yield step


def _retire_if_unnamed(kept: ResidentEntry) -> None:
    if not kept.names and kept.content_key is None:
        kept.retire()


def _check_alive(session: Session) -> None:
    # Without the lock of `Sessions`: it calls `end` once it has set the state, so what is named
    # meanwhile is dropped again.
    if session.state is SessionState.ENDED:
        raise LostSessionError(
            "session must be one that this server holds, and this one has ended", argument="session"
        )
