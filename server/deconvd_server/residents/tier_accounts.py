"""What each tenant has in one memory tier, and who exceeds its share of it. No I/O and no locks."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from deconvd_server.residents.lru_queue import LruQueue
from deconvd_server.residents.tenant import Tenant

__all__ = ["OwnerAccount", "TenantAccount", "TierAccounts"]

_E = TypeVar("_E")


class OwnerAccount:
    """What all tenants of one owner have in a tier together. See `Tenant.owner`.

    Attributes:
        size_bytes: The sum of the accounts of its tenants.
        tenants_count: How many of its tenants have an account.
    """

    __slots__ = ("size_bytes", "tenants_count")

    def __init__(self) -> None:
        self.size_bytes = 0
        self.tenants_count = 0


class TenantAccount(Generic[_E]):
    """What one tenant has in a tier.

    Attributes:
        owner: What its owner has.
        size_bytes: The bytes charged for its tensors here and for the room reserved for it.
        count: How many tensors it has here.
        idle: Its tensors that have no users, the least recently used first.
        resting: Its tensors whose users all rest; first the one whose users have rested for longest.
    """

    __slots__ = ("count", "idle", "owner", "resting", "size_bytes")

    def __init__(self, owner: OwnerAccount) -> None:
        self.owner = owner
        self.size_bytes = 0
        self.count = 0
        self.idle: LruQueue[_E] = LruQueue()
        self.resting: LruQueue[_E] = LruQueue()


class TierAccounts(Generic[_E]):
    """The accounts of all tenants in a tier.

    All owners that have room in the tier, or ask for some, have equal shares of it. The tenants of one owner have equal
    parts of its share. A tenant without an identity is its own owner.

    A tenant exceeds its share, as others see it, if it has more than its part of its owner's share. For a tenant of
    another owner, the owner must exceed its share, too: what the tenants of one owner take from each other is no
    business of the others.

    Args:
        limit_bytes: The size of the tier.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._accounts: dict[Tenant, TenantAccount[_E]] = {}
        self._owners: dict[Hashable, OwnerAccount] = {}

    def get(self, tenant: Tenant | None) -> TenantAccount[_E] | None:
        """Return the account of a tenant; None if it has nothing here."""
        return None if tenant is None else self._accounts.get(tenant)

    def __getitem__(self, tenant: Tenant) -> TenantAccount[_E]:
        return self._accounts[tenant]

    def __iter__(self) -> Iterator[TenantAccount[_E]]:
        return iter(self._accounts.values())

    def charge(self, tenant: Tenant, size_bytes: int) -> None:
        """Count bytes for a tenant, which gets an account if it has none."""
        account = self._accounts.get(tenant)
        if account is None:
            owner = self._owners.setdefault(tenant.owner, OwnerAccount())
            owner.tenants_count += 1
            account = self._accounts[tenant] = TenantAccount(owner)
        account.size_bytes += size_bytes
        account.owner.size_bytes += size_bytes

    def give_back(self, tenant: Tenant, size_bytes: int) -> None:
        """Take back a charge. An account without bytes is removed."""
        account = self._accounts[tenant]
        account.size_bytes -= size_bytes
        account.owner.size_bytes -= size_bytes
        if not account.size_bytes:
            del self._accounts[tenant]
            account.owner.tenants_count -= 1
            if not account.owner.tenants_count:
                del self._owners[tenant.owner]

    def is_within_share(self, size_bytes: int, tenant: Tenant | None) -> bool:
        """Return whether a tenant or its owner would be within its share with that many more bytes."""
        if tenant is None:
            return False
        account, owner = self._accounts.get(tenant), self._owners.get(tenant.owner)
        owner_share = self._owner_share(tenant)
        if owner is None:
            return size_bytes <= owner_share
        if owner.size_bytes + size_bytes <= owner_share:
            return True
        if account is None:
            return size_bytes <= owner_share // (owner.tenants_count + 1)
        return account.size_bytes + size_bytes <= owner_share // owner.tenants_count

    def exceeds_share(self, account: TenantAccount[_E], tenant: Tenant | None) -> bool:
        """Return whether an account has more than its share, as seen by a tenant that asks for room.

        Args:
            tenant: The tenant that asks, which counts for the shares even if it has nothing here yet. None for a call
                without a session, which is nobody's.
        """
        owner, owner_share = account.owner, self._owner_share(tenant)
        own = None if tenant is None else self._owners.get(tenant.owner)
        if own is not owner:
            is_over = owner.size_bytes > owner_share
            return is_over and account.size_bytes > owner_share // owner.tenants_count
        tenants_count = owner.tenants_count + (tenant not in self._accounts)
        return account.size_bytes > owner_share // tenants_count

    def _owner_share(self, tenant: Tenant | None) -> int:
        is_new = tenant is not None and tenant.owner not in self._owners
        # none may be left by now: `MemoryTier.blocks_share` asks without the lock
        return self._limit_bytes // max(len(self._owners) + is_new, 1)
