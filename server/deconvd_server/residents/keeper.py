"""The keeper of tensors: what is kept, for whom, and by which names."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence

from deconvd.cache_state import CacheState
from deconvd.errors import ExhaustedError, LostSessionError, LostTensorError
from deconvd.problem import TensorSpec
from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device import Tensor
from deconvd_server.engine import Engine
from deconvd_server.residents.kept import Kept, Quotas, counted_bytes
from deconvd_server.residents.shelving import Shelving
from deconvd_server.residents.tenant import Session, SessionState, Tenant
from deconvd_server.secret_names import Named

__all__ = ["Keeper"]

_WAIT_S = 0.05
"""How often one who waits for a tensor on its way looks whether its call is still wanted."""


class Keeper:
    """Keeps tensors for sessions, each of a tenant's for all of the tenant's sessions. Thread-safe.

    Whoever gets a tensor from it is its user, and ends that by `release`: until then it stays where
    it is, whatever is dropped. What nothing stands for is freed after its last user.

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
        self._names: Named[Kept] = Named()
        self._names_by_session: dict[Session, set[bytes]] = {}
        # what tenants sent for a digest, by the digest and the form that it was sent in
        self._contents: dict[Tenant, dict[Hashable, Kept]] = {}
        self._quotas = Quotas()
        self._shelving = Shelving(
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

    def make(self, session: Session, spec: TensorSpec, engine: Engine, call: Call) -> Kept:
        """Return a new tensor on an engine's device, with any elements. The caller is its user.

        Nothing stands for it: unless `name` or `offer` lets something, `release` frees it.

        Raises:
            LostSessionError: The session has ended.
            ExhaustedError: The tenant's quota, or the memory for tensors that stay, has no room.
            UnavailableError: Calls take the memory now.
        """
        size_bytes = counted_bytes(spec)
        with self._changed:
            _check_alive(session)
            self._take_quota(session, size_bytes)
        self._shelving.sweep()
        try:
            return self._shelving.make(session.tenant, spec, engine, call)
        except BaseException:
            with self._changed:
                self._quotas.give_back(session.tenant, size_bytes)
            raise

    def name(self, kept: Kept, session: Session, name: bytes) -> None:
        """Let a new name stand for a tensor that the caller uses, until the session ends.

        Raises:
            LostSessionError: It has ended.
        """
        with self._changed:
            _check_alive(session)
            if not kept.is_live:
                raise RuntimeError("a tensor that is dropped cannot be named")
            self._names.put(name, kept)
            self._names_by_session.setdefault(session, set()).add(name)
            kept.names[name] = session

    def offer(self, kept: Kept, session: Session, content_key: Hashable) -> None:
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
                kept.shelf.misses_count += 1

    def drop(self, session: Session, names: Iterable[bytes]) -> None:
        """Let names of a session stand for nothing. Those that it does not have are passed over."""
        with self._changed:
            for name in self._names_by_session.get(session, set()).intersection(names):
                self._drop_name(name)
        self._shelving.sweep()

    def end(self, session: Session, is_last: bool) -> None:
        """Drop what was kept for a session that has ended, and its tenant's contents if it was the last."""
        with self._changed:
            for name in tuple(self._names_by_session.get(session, ())):
                self._drop_name(name)
            self._names_by_session.pop(session, None)
            if is_last:
                for kept in self._contents_of(session.tenant):
                    self._forget_content(kept)
                    _retire_unless_wanted(kept)
                self._contents.pop(session.tenant, None)
        self._shelving.sweep()

    def by_name(self, session: Session, name: bytes, argument: str, call: Call) -> Kept:
        """Return the tensor of a name. The caller is its user.

        Args:
            argument: Which argument it is for, for errors.

        Raises:
            LostTensorError: There is none that the session's tenant may use.
        """

        def find() -> Kept | None:
            kept = self._names.get(name)
            return kept if kept is not None and kept.tenant is session.tenant else None

        kept = self._acquired(find, call)
        if kept is None:
            raise LostTensorError(
                f"{argument} must be kept by this server, and the tensor named is unknown, was "
                "dropped, or had to make room",
                argument=argument,
            )
        return kept

    def by_content(self, session: Session, content_key: Hashable, call: Call) -> Kept | None:
        """Return the tensor of a content, or None. The caller is its user."""

        def find() -> Kept | None:
            return self._contents.get(session.tenant, {}).get(content_key)

        kept = self._acquired(find, call)
        with self._changed:
            if kept is not None and kept.content_key is not None:
                contents = self._contents[session.tenant]
                contents[content_key] = contents.pop(content_key)  # the oldest come first
        return kept

    def release(self, kept: Kept) -> None:
        """Use a tensor no more."""
        with self._changed:
            kept.life.release()
            if not kept.life.users_count:
                _retire_unless_wanted(kept)
        self._shelving.sweep()

    def operand(self, kept: Kept, engine: Engine, call: Call) -> Tensor:
        """Return the elements of a tensor that the caller uses. See `Shelving.operand`."""
        return self._shelving.operand(kept, engine, call)

    def array(self, kept: Kept, call: Call, out: Array | None = None) -> Array:
        """Return the elements of a tensor that the caller uses. See `Shelving.array`."""
        return self._shelving.array(kept, call, out)

    def states(self, engine: Engine) -> list[CacheState]:
        """Return what is kept on an engine's device now, and beneath it."""
        return self._shelving.states(engine)

    def _acquired(self, find: Callable[[], Kept | None], call: Call) -> Kept | None:
        """Return what is found, with one more user, once it is not on its way elsewhere."""
        with self._changed:
            while (kept := find()) is not None and kept.is_moving:
                self._changed.wait(_WAIT_S)
                call.check()
            if kept is not None:
                kept.life.acquire()
                kept.shelf.touch(kept)
            return kept

    def _take_quota(self, session: Session, size_bytes: int) -> None:
        tenant = session.tenant
        # what content alone stands for can be sent again: it makes room, the oldest first
        idle = (kept for kept in self._contents_of(tenant) if kept.is_idle)
        while not self._quotas.have_room(tenant, size_bytes):
            kept = next((kept for kept in idle if not kept.names), None)
            if kept is None or size_bytes > tenant.quota_bytes:
                raise ExhaustedError(
                    f"a tenant may keep {tenant.quota_bytes} bytes of tensors, and this one keeps "
                    f"{self._quotas.used_bytes(tenant)}: {size_bytes} more are over its quota"
                )
            self._shelving.evict(kept)
        self._quotas.take(tenant, size_bytes)

    def _contents_of(self, tenant: Tenant) -> tuple[Kept, ...]:
        """Return what content stands for, the least recently found first."""
        return tuple(self._contents.get(tenant, {}).values())

    def _forget(self, kept: Kept) -> None:
        """Let nothing stand for a tensor."""
        for name in tuple(kept.names):
            self._forget_name(name)
        self._forget_content(kept)

    def _forget_name(self, name: bytes) -> Kept:
        kept = self._names.pop(name)
        self._names_by_session[kept.names.pop(name)].remove(name)
        return kept

    def _forget_content(self, kept: Kept) -> None:
        if kept.content_key is not None:
            del self._contents[kept.tenant][kept.content_key]
            kept.content_key = None

    def _drop_name(self, name: bytes) -> None:
        _retire_unless_wanted(self._forget_name(name))


def _retire_unless_wanted(kept: Kept) -> None:
    if not kept.names and kept.content_key is None:
        kept.life.retire()


def _check_alive(session: Session) -> None:
    # Without the lock of `Sessions`: it calls `end` once it has set the state, so what is named
    # meanwhile is dropped again.
    if session.state is SessionState.ENDED:
        raise LostSessionError(
            "session must be one that this server holds, and this one has ended", argument="session"
        )
