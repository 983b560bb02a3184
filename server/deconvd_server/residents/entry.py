"""A tensor that is kept, and the bounded memory that such tensors lie in. No I/O, and no locks: the keeper's."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from itertools import count, islice
from typing import Final

import numpy as np

from deconvd.model.problem import TensorSpec
from deconvd.wire.cache_state import CacheState
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine.engine import Engine
from deconvd_server.residents.lru_queue import LruQueue
from deconvd_server.residents.quotas import counted_bytes
from deconvd_server.residents.tenant import Session, Tenant
from deconvd_server.resources.cache import EntryState

__all__ = ["RETRY_AFTER_S", "MemoryTier", "ResidentEntry"]

RETRY_AFTER_S: Final = 0.5
"""What a caller is told whose tensors have to make room, or find none: about as long as calls use tensors."""

_SEQUENCE: Final = count(1)
"""Tells what came into its row before what, whichever row that is."""


class ResidentEntry:
    """A tensor that is kept, or is being made to be.

        LIVE --retire--> RETIRED --last release--> FREED
        LIVE, RETIRED --revoke, while all its users rest--> FREED

    Its users are the calls that need it where it is, and who moves it. It is retired when nothing
    stands for it any more. A user rests while it waits for its client: what is promised to another
    tenant may be taken from under it then, and it finds the tensor `is_gone`.

    Args:
        on_unused: Called with the tensor once it is FREED.

    Attributes:
        shelf: Where it lies.
        operand: Its elements there.
        size_bytes: What it counts for, without what it has grown by.
        grown_bytes: What the device keeps with it beside its elements.
        is_moving: Whether it is on its way from one shelf to another: it gets no users meanwhile.
        names: The names that stand for it, each with the session that it was given to.
        content_key: What stands for it among its tenant's contents; None if nothing does.
        state: What has become of it.
        users_count: Its users.
        resting_count: Those that rest.
        row: That of its shelf in which it is; None while it is in use.
        used_at: When it came into its row: later numbers are larger.
    """

    __slots__ = (
        "_on_unused",
        "content_key",
        "grown_bytes",
        "is_moving",
        "names",
        "operand",
        "queue",
        "resting_count",
        "size_bytes",
        "spec",
        "state",
        "tenant",
        "tier",
        "used_at",
        "users_count",
    )

    def __init__(
        self,
        tenant: Tenant,
        spec: TensorSpec,
        shelf: MemoryTier,
        operand: Tensor,
        on_unused: Callable[[ResidentEntry], None],
    ) -> None:
        self.tenant = tenant
        self.spec = spec
        self.tier = shelf
        self.operand = operand
        self.size_bytes = counted_bytes(spec)
        self.grown_bytes = 0
        self.is_moving = False
        self.names: dict[bytes, Session] = {}
        self.content_key: Hashable | None = None
        self.queue: LruQueue[ResidentEntry] | None = None
        self.used_at = 0
        self.users_count = 0
        self.resting_count = 0
        self.state = EntryState.LIVE
        self._on_unused = on_unused

    @property
    def device_tensor(self) -> DeviceTensor:
        """Its elements, which lie on a device: as they do until its maker rests or releases it."""
        if isinstance(self.operand, np.ndarray):
            raise RuntimeError("the tensor lies in host memory")
        return self.operand

    @property
    def charged_bytes(self) -> int:
        """What it counts for where it lies."""
        return self.size_bytes + self.grown_bytes

    @property
    def device_bytes(self) -> int:
        """What it takes of its device's memory."""
        return self.spec.nbytes + self.grown_bytes

    @property
    def is_live(self) -> bool:
        """Whether it can be named, and get users."""
        return self.state is EntryState.LIVE

    @property
    def is_freed(self) -> bool:
        """Whether its memory is given up."""
        return self.state is EntryState.FREED

    @property
    def is_idle(self) -> bool:
        """Whether it is live and nobody uses it."""
        return self.state is EntryState.LIVE and not self.users_count

    @property
    def is_resting(self) -> bool:
        """Whether it has users, all of which rest."""
        return 0 < self.users_count == self.resting_count and self.state is not EntryState.FREED

    def acquire(self) -> None:
        """Add a user."""
        if self.state is not EntryState.LIVE:
            raise RuntimeError(f"cannot acquire a tensor that is {self.state.value}")
        self.users_count += 1
        if self.queue is not None:
            self.tier.update_queue(self)

    def release(self) -> None:
        """Remove a user, which does not rest."""
        if self.users_count <= self.resting_count:
            raise RuntimeError("released more often than acquired")
        self.users_count -= 1
        if self.state is EntryState.LIVE:
            self.tier.update_queue(self)
        else:
            self._update_state()

    def rest(self) -> None:
        """Let a user rest."""
        self.resting_count += 1
        self._update_state()

    def resume(self) -> None:
        """Let a user that rests go on: see `is_gone`."""
        self.resting_count -= 1
        self._update_state()

    def retire(self) -> None:
        """Take no new users. Retiring twice is harmless."""
        if self.state is EntryState.LIVE:
            self.state = EntryState.RETIRED
        self._update_state()

    def revoke(self) -> None:
        """Retire, and do not wait for users that rest if there are no others."""
        self.retire()
        if self.is_resting:
            self._free()

    def _update_state(self) -> None:
        if self.state is EntryState.FREED:
            return
        if self.state is EntryState.RETIRED and not self.users_count:
            self._free()
        else:
            self.tier.update_queue(self)

    def _free(self) -> None:
        self.state = EntryState.FREED
        self._on_unused(self)


class _TenantAccount:
    """What one tenant has on a shelf.

    Attributes:
        size_bytes: What its tensors here and the room that was taken for it count for.
        count: Its tensors here.
        idle: Those that nobody uses, the least recently used first.
        resting: Those whose users all rest, the one whose users have rested for longest first.
    """

    __slots__ = ("count", "idle", "resting", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self.count = 0
        self.idle: LruQueue[ResidentEntry] = LruQueue()
        self.resting: LruQueue[ResidentEntry] = LruQueue()


class MemoryTier:
    """Memory for kept tensors, bounded: who has how much of it, and what was used least recently.

    Each tenant that has, or asks for, room here has the same share of it. Nothing here looks at more
    than each tenant, and at what it yields, however many tensors there are.

    Args:
        engine: Whose device's memory it is; None for the host's.
        below: Where tensors go when there is no room for them here; None if they are dropped then.

    Attributes:
        used_bytes: What the tensors here take, those that are being freed and room that was taken
            for others included.
        leaving_bytes: The part of it that is being freed.
    """

    def __init__(
        self, limit_bytes: int, engine: Engine | None, below: MemoryTier | None = None
    ) -> None:
        self.limit_bytes = limit_bytes
        self.engine = engine
        self.lower_tier = below
        self.used_bytes = 0
        self.evicting_bytes = 0
        self._accounts: dict[object, _TenantAccount] = {}  # by tenant

    @property
    def device_engine(self) -> Engine:
        """Whose device's memory it is."""
        if self.engine is None:
            raise RuntimeError("host memory is no engine's")
        return self.engine

    def fits(self, size_bytes: int) -> bool:
        """Return whether there is room for so much more."""
        return self.used_bytes + size_bytes <= self.limit_bytes

    def will_fit(self, size_bytes: int) -> bool:
        """Return whether there will be once all that leaves has left."""
        return self.lacking_bytes(size_bytes) <= 0

    def lacking_bytes(self, size_bytes: int) -> int:
        """Return what else must leave for that."""
        return self.used_bytes - self.evicting_bytes + size_bytes - self.limit_bytes

    def can_make_room(self, size_bytes: int, tenant: object, is_promised: bool = False) -> bool:
        """Return whether there would be room for so much more without all that is `displaceable`."""
        if self.will_fit(size_bytes):
            return True
        rows = (row for rows in self._evictable_queues(tenant, is_promised) for _, row in rows)
        return sum(row.size_bytes for row in rows) >= self.lacking_bytes(size_bytes)

    def is_within_share(self, size_bytes: int, tenant: object) -> bool:
        """Return whether a tenant has no more than its share with so much more."""
        return tenant is not None and self._size_bytes(tenant) + size_bytes <= self._share(tenant)

    def blocks_share(self, kept: ResidentEntry, tenant: object) -> bool:
        """Return whether a tensor is here and its tenant, another one, has more than its share."""
        return (
            kept.tier is self
            and kept.tenant is not tenant
            and self._size_bytes(kept.tenant) > self._share(tenant)
        )

    def reserve(self, tenant: Tenant, size_bytes: int) -> None:
        """Count room as a tenant's, for what is about to come."""
        self.used_bytes += size_bytes
        self._accounts.setdefault(tenant, _TenantAccount()).size_bytes += size_bytes

    def add(self, kept: ResidentEntry) -> None:
        """Let a tensor lie here, for which room was taken."""
        self._accounts[kept.tenant].count += 1
        self.update_queue(kept)

    def update_queue(self, kept: ResidentEntry) -> None:
        """Note whether a tensor here is in use, rests or is idle."""
        row: LruQueue[ResidentEntry] | None = None
        if not kept.users_count:
            if kept.state is EntryState.LIVE:
                row = self._accounts[kept.tenant].idle
        elif kept.users_count == kept.resting_count:
            row = self._accounts[kept.tenant].resting
        if row is not kept.queue:
            self._move_to_queue(kept, row)

    def remove(self, kept: ResidentEntry) -> None:
        """Let a tensor lie here no more. Its room is free once it has `left`."""
        self._move_to_queue(kept, None)
        self._accounts[kept.tenant].count -= 1
        self.cancel_reservation(kept.tenant, kept.charged_bytes)

    def cancel_reservation(self, tenant: Tenant, size_bytes: int) -> None:
        """Give up room that was taken for what has not come."""
        self.evicting_bytes += size_bytes
        account = self._accounts[tenant]
        account.size_bytes -= size_bytes
        if not account.size_bytes:
            del self._accounts[tenant]

    def note_freed(self, size_bytes: int) -> None:
        """Count room that was given up as free: its memory is."""
        self.used_bytes -= size_bytes
        self.evicting_bytes -= size_bytes

    def evictable(self, tenant: object, is_promised: bool = False) -> Iterator[ResidentEntry]:
        """Yield what may make room, the least recently used first.

        Those are the idle tensors of the tenant's own, and of tenants that have more than their share.
        For what is promised to a tenant none of its own have to go. Those of others that rest do,
        after the idle ones: nobody's client keeps another from its share by waiting.

        What is yielded is to be displaced before the next is asked for.

        Args:
            tenant: For whom; None for a call without one.
            is_promised: Whether the room is within the tenant's share; see `is_promised`.
        """
        share_bytes = self._share(tenant)
        own = self._accounts.get(tenant)
        for rows in self._evictable_queues(tenant, is_promised):
            heads = [
                (first.used_at, account, row)
                for account, row in rows
                if (first := row.first) is not None
            ]
            heapq.heapify(heads)
            while heads:
                _, account, row = heads[0]
                kept = row.first
                if kept is None or (account is not own and account.size_bytes <= share_bytes):
                    heapq.heappop(heads)
                    continue
                yield kept
                if (first := row.first) is None or first is kept:
                    heapq.heappop(heads)
                else:
                    heapq.heapreplace(heads, (first.used_at, account, row))

    def least_recently_used(self, tensors_count: int) -> list[ResidentEntry]:
        """Return so many of the tensors that nobody uses, the least recently used first."""
        rows = (iter(account.idle) for account in self._accounts.values())
        return list(islice(heapq.merge(*rows, key=lambda kept: kept.used_at), tensors_count))

    def cache_state(self, name: str, tenant: Tenant | None) -> CacheState:
        """Return what a tenant has here now; nothing for None."""
        account = None if tenant is None else self._accounts.get(tenant)
        return CacheState(
            name=name,
            count=0 if account is None else account.count,
            size_bytes=0 if account is None else account.size_bytes,
            limit_bytes=self.limit_bytes,
            hits_count=0 if tenant is None else tenant.hits[self],
            misses_count=0 if tenant is None else tenant.misses[self],
        )

    def _evictable_queues(
        self, tenant: object, is_promised: bool
    ) -> Iterator[list[tuple[_TenantAccount, LruQueue[ResidentEntry]]]]:
        """Yield the rows that may make room; tensors of the first go first."""
        share_bytes, own = self._share(tenant), self._accounts.get(tenant)
        beyond = [
            account
            for account in self._accounts.values()
            if account is not own and account.size_bytes > share_bytes
        ]
        if is_promised:
            yield [(account, account.idle) for account in beyond]
            yield [(account, account.resting) for account in beyond]
        else:
            with_own = beyond if own is None else [own, *beyond]
            yield [(account, account.idle) for account in with_own]

    def _size_bytes(self, tenant: object) -> int:
        account = self._accounts.get(tenant)
        return 0 if account is None else account.size_bytes

    def _share(self, tenant: object) -> int:
        is_new = tenant is not None and tenant not in self._accounts
        return self.limit_bytes // max(len(self._accounts) + is_new, 1)

    def _move_to_queue(self, kept: ResidentEntry, row: LruQueue[ResidentEntry] | None) -> None:
        size_bytes = kept.size_bytes + kept.grown_bytes  # does not change while it is in a row
        if kept.queue is not None:
            del kept.queue[kept]
            kept.queue.size_bytes -= size_bytes
        kept.queue = row
        if row is not None:
            kept.used_at = next(_SEQUENCE)
            row[kept] = None
            row.size_bytes += size_bytes
