"""A resident tensor's state, and the bounded memory that it is in. No I/O and no locks.

All belong to one `ResidentRegistry`, and are called with its lock held. A user that does not rest may read a tensor's
`tier` and `operand` without it: they do not change meanwhile.
"""

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
from deconvd_server.residents.tier_accounts import TenantAccount, TierAccounts
from deconvd_server.resources.cache import EntryState

__all__ = ["RETRY_AFTER_S", "MemoryTier", "ResidentEntry"]

RETRY_AFTER_S: Final = 0.5
"""How long a caller should wait when tensors find no room or must make room: about as long as calls use tensors."""

_SEQUENCE: Final = count(1)  # orders entries of different queues by when they joined


class ResidentEntry:
    """A resident tensor, from the moment its memory is allocated.

        LIVE --retire--> RETIRED --last release--> FREED
        LIVE, RETIRED --revoke, while all its users rest--> FREED

    Its users are the calls that need it to stay where it is, and the thread that moves it. It is retired once no
    name and no content stands for it. A user rests while it waits for its client: meanwhile the tensor may be evicted
    for another tenant's share, so a user that resumes must check `is_freed`.

    Args:
        on_unused: Called with the entry once it is FREED.

    Attributes:
        tier: The memory that it is in.
        operand: Its elements there.
        size_bytes: The bytes that are charged for it to its tier and its tenant.
        is_moving: Whether it is being copied to another tier. It gets no new users until that is done.
        names: The names that stand for it, each with its session.
        content_key: Its key in its tenant's table of contents; None if it is not in it.
        queue: The queue of its tier that it is in; None while a user that does not rest uses it.
        used_at: Number from `_SEQUENCE`, drawn when it joined its queue: later numbers are larger.
    """

    __slots__ = (
        "_on_unused",
        "content_key",
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
        tier: MemoryTier,
        operand: Tensor,
        on_unused: Callable[[ResidentEntry], None],
    ) -> None:
        self.tenant = tenant
        self.spec = spec
        self.tier = tier
        self.operand = operand
        self.size_bytes = counted_bytes(spec)
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
        """Its elements on a device. They are there from `make` until its maker rests or releases it."""
        if isinstance(self.operand, np.ndarray):
            raise RuntimeError("the tensor is in host memory")
        return self.operand

    @property
    def is_live(self) -> bool:
        return self.state is EntryState.LIVE

    @property
    def is_freed(self) -> bool:
        return self.state is EntryState.FREED

    @property
    def is_idle(self) -> bool:
        return self.state is EntryState.LIVE and not self.users_count

    @property
    def is_resting(self) -> bool:
        return 0 < self.users_count == self.resting_count and self.state is not EntryState.FREED

    def acquire(self) -> None:
        if self.state is not EntryState.LIVE:
            raise RuntimeError(f"cannot acquire a tensor that is {self.state.value}")
        self.users_count += 1
        if self.queue is not None:
            self.tier.update_queue(self)

    def release(self) -> None:
        """Remove a user that does not rest."""
        if self.users_count <= self.resting_count:
            raise RuntimeError("released more often than acquired")
        self.users_count -= 1
        if self.state is EntryState.LIVE:
            self.tier.update_queue(self)
        else:
            self._update_state()

    def rest(self) -> None:
        self.resting_count += 1
        self._update_state()

    def resume(self) -> None:
        """End the rest of a user, which must check `is_freed` next."""
        self.resting_count -= 1
        self._update_state()

    def retire(self) -> None:
        """Take no new users. Retiring twice is harmless."""
        if self.state is EntryState.LIVE:
            self.state = EntryState.RETIRED
        self._update_state()

    def revoke(self) -> None:
        """Retire it, and free it at once if all its users rest."""
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


class MemoryTier:
    """A bounded amount of memory for resident tensors: a device's, or the host's.

    Tenants have shares of `limit_bytes`: see `TierAccounts`. The cost of a method grows with the number of
    tenants, and of tensors that it yields, not of all tensors here.
    Bytes are counted in three steps, so that no memory is promised twice:

        reserve           --> add --> remove, or cancel_reservation --> note_freed
        used_bytes grows              evicting_bytes grows              both shrink

    Args:
        engine: The engine whose device has this memory; None for host memory.
        lower_tier: Where tensors are spilled when this tier is full; None if they are dropped instead.

    Attributes:
        used_bytes: The bytes of all tensors here, including those being freed, and of reserved room.
        evicting_bytes: The part of `used_bytes` that is being freed.
    """

    def __init__(
        self, limit_bytes: int, engine: Engine | None, lower_tier: MemoryTier | None = None
    ) -> None:
        self.limit_bytes = limit_bytes
        self.engine = engine
        self.lower_tier = lower_tier
        self.used_bytes = 0
        self.evicting_bytes = 0
        self._name = "resident tensors" if engine else "resident tensors in host memory"
        self._count = self._hits_count = self._misses_count = self._evictions_count = 0
        self._accounts: TierAccounts[ResidentEntry] = TierAccounts(limit_bytes)

    @property
    def device_engine(self) -> Engine:
        if self.engine is None:
            raise RuntimeError("host memory belongs to no engine")
        return self.engine

    def fits(self, size_bytes: int) -> bool:
        """Return whether that many more bytes are free now."""
        return self.used_bytes + size_bytes <= self.limit_bytes

    def will_fit(self, size_bytes: int) -> bool:
        """Return whether they will be free once everything that is being freed has been."""
        return self.lacking_bytes(size_bytes) <= 0

    def lacking_bytes(self, size_bytes: int) -> int:
        """Return how many more bytes must be evicted for them."""
        return self.used_bytes - self.evicting_bytes + size_bytes - self.limit_bytes

    def can_make_room(
        self, size_bytes: int, tenant: Tenant | None, is_within_share: bool = False
    ) -> bool:
        """Return whether evicting everything that is `evictable` would make room for that many more bytes."""
        if self.will_fit(size_bytes):
            return True
        queues = (
            queue
            for queues in self._evictable_queues(tenant, is_within_share)
            for _, queue in queues
        )
        return sum(queue.size_bytes for queue in queues) >= self.lacking_bytes(size_bytes)

    def is_within_share(self, size_bytes: int, tenant: Tenant | None) -> bool:
        """Return whether a tenant would be within its share with that many more bytes."""
        return self._accounts.is_within_share(size_bytes, tenant)

    def blocks_share(self, entry: ResidentEntry, tenant: Tenant | None) -> bool:
        """Return whether a tensor of another tenant is here, and that tenant exceeds its share. Needs no lock."""
        if entry.tier is not self or entry.tenant is tenant:
            return False
        account = self._accounts.get(entry.tenant)
        return account is not None and self._accounts.exceeds_share(account, tenant)

    def reserve(self, tenant: Tenant, size_bytes: int) -> None:
        """Charge a tenant for bytes that it is about to use."""
        self.used_bytes += size_bytes
        self._accounts.charge(tenant, size_bytes)

    def add(self, entry: ResidentEntry) -> None:
        """Add a tensor, whose bytes were reserved."""
        self._count += 1
        self._accounts[entry.tenant].count += 1
        self.update_queue(entry)

    def update_queue(self, entry: ResidentEntry) -> None:
        """Put a tensor into the queue that fits its users now: idle, resting, or none while it is in use."""
        queue: LruQueue[ResidentEntry] | None = None
        if not entry.users_count:
            if entry.state is EntryState.LIVE:
                queue = self._accounts[entry.tenant].idle
        elif entry.users_count == entry.resting_count:
            queue = self._accounts[entry.tenant].resting
        if queue is not entry.queue:
            self._move_to_queue(entry, queue)

    def remove(self, entry: ResidentEntry) -> None:
        """Remove a tensor. Its bytes are free once `note_freed` is called."""
        self._move_to_queue(entry, None)
        self._count -= 1
        self._accounts[entry.tenant].count -= 1
        self.cancel_reservation(entry.tenant, entry.size_bytes)

    def cancel_reservation(self, tenant: Tenant, size_bytes: int) -> None:
        """Take back a charge of `reserve`. The bytes are free once `note_freed` is called."""
        self.evicting_bytes += size_bytes
        self._accounts.give_back(tenant, size_bytes)

    def note_freed(self, size_bytes: int) -> None:
        """Count bytes as free: their memory has been freed."""
        self.used_bytes -= size_bytes
        self.evicting_bytes -= size_bytes

    def evictable(
        self, tenant: Tenant | None, is_within_share: bool = False
    ) -> Iterator[ResidentEntry]:
        """Yield the tensors that may be evicted for a tenant, the least recently used first.

        These are idle tensors: the tenant's own, and those of tenants that exceed their shares. If the
        room is within the tenant's share, its own tensors are not yielded, and resting tensors of
        tenants that exceed their shares follow the idle ones: a client that makes the server wait cannot
        keep another tenant from its share. The caller must evict each tensor before it asks for the next.

        Args:
            tenant: The tenant that needs the room; None for a call without a session.
            is_within_share: Whether the room is within the tenant's share.
        """
        own = self._accounts.get(tenant)
        for queues in self._evictable_queues(tenant, is_within_share):
            # a heap of queues by their oldest entry: it merges them without copying any
            heads = [
                (first.used_at, account, queue)
                for account, queue in queues
                if (first := queue.first) is not None
            ]
            heapq.heapify(heads)
            while heads:
                _, account, queue = heads[0]
                entry = queue.first
                # evictions since the last yield may have brought its tenant back within its share
                if entry is None or not (
                    account is own or self._accounts.exceeds_share(account, tenant)
                ):
                    heapq.heappop(heads)
                    continue
                yield entry
                # a tensor that is still there was not evicted: its queue has nothing else to give
                if (first := queue.first) is None or first is entry:
                    heapq.heappop(heads)
                else:
                    heapq.heapreplace(heads, (first.used_at, account, queue))

    def least_recently_used(self, tensors_count: int) -> list[ResidentEntry]:
        """Return at most that many idle tensors of all tenants, the least recently used first."""
        queues = (iter(account.idle) for account in self._accounts)
        return list(islice(heapq.merge(*queues, key=lambda entry: entry.used_at), tensors_count))

    def cache_state(self, tenant: Tenant | None) -> CacheState:
        """Return how many tensors and bytes a tenant has here; zeros if it is None."""
        account = self._accounts.get(tenant)
        return CacheState(
            name=self._name,
            count=0 if account is None else account.count,
            size_bytes=0 if account is None else account.size_bytes,
            limit_bytes=self.limit_bytes,
            hits_count=0 if tenant is None else tenant.hits[self],
            misses_count=0 if tenant is None else tenant.misses[self],
            evictions_count=0 if tenant is None else tenant.evictions[self],
        )

    def whole_state(self) -> CacheState:
        """Return the same of all tenants together, of those that are gone, too."""
        return CacheState(
            name=self._name,
            count=self._count,
            size_bytes=self.used_bytes,
            limit_bytes=self.limit_bytes,
            hits_count=self._hits_count,
            misses_count=self._misses_count,
            evictions_count=self._evictions_count,
        )

    def note_hit(self, tenant: Tenant) -> None:
        """Count a tensor that was here when a call needed it here."""
        tenant.hits[self] += 1
        self._hits_count += 1

    def note_miss(self, tenant: Tenant) -> None:
        """Count a tensor that had to be brought or sent here."""
        tenant.misses[self] += 1
        self._misses_count += 1

    def note_eviction(self, tenant: Tenant) -> None:
        """Count a tensor that had to leave this memory for others."""
        tenant.evictions[self] += 1
        self._evictions_count += 1

    def _evictable_queues(
        self, tenant: Tenant | None, is_within_share: bool
    ) -> Iterator[list[tuple[TenantAccount[ResidentEntry], LruQueue[ResidentEntry]]]]:
        """Yield groups of queues that may be evicted from. The first group is used up before the next."""
        own = self._accounts.get(tenant)
        exceeding = [
            account
            for account in self._accounts
            if account is not own and self._accounts.exceeds_share(account, tenant)
        ]
        if is_within_share:
            yield [(account, account.idle) for account in exceeding]
            yield [(account, account.resting) for account in exceeding]
        else:
            candidates = exceeding if own is None else [own, *exceeding]
            yield [(account, account.idle) for account in candidates]

    def _move_to_queue(self, entry: ResidentEntry, queue: LruQueue[ResidentEntry] | None) -> None:
        if entry.queue is not None:
            del entry.queue[entry]
            entry.queue.size_bytes -= entry.size_bytes
        entry.queue = queue
        if queue is not None:
            entry.used_at = next(_SEQUENCE)
            queue[entry] = None
            queue.size_bytes += entry.size_bytes
