"""How many bytes a resident tensor is charged for, and how much of its quota each owner of tenants uses.

No I/O and no locks: the registry's lock guards it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Final

from deconvd.model.problem import TensorSpec
from deconvd_server.residents.tenant import Tenant
from deconvd_server.resources.shared_quotas import SharedQuotas

__all__ = ["Quotas", "counted_bytes", "names_limit"]

_OBJECTS_BYTES: Final = 2560
"""Charge for a small tensor in addition to its elements: the Python objects for the tensor, one name and one content.

Measured: 1.6 KiB on the CPU device. Estimated: 2.5 KiB of host memory for a tensor on a card.
"""

_SMALL_BYTES: Final = 16 << 10
"""A tensor of at least this size is charged for its elements alone: the objects add less than a sixth."""

_NAME_BYTES: Final = 320
"""Largest size of one additional name of a tensor."""


def counted_bytes(spec: TensorSpec) -> int:
    """Return how many bytes a tensor is charged for, against limits and quotas."""
    return max(spec.nbytes, min(spec.nbytes + _OBJECTS_BYTES, _SMALL_BYTES))


def names_limit(spec: TensorSpec) -> int:
    """Return how many names a tensor may have at once: all of them take no more memory than it is charged for."""
    return counted_bytes(spec) // _NAME_BYTES


class Quotas:
    """How many bytes of its quota each owner of tenants uses, on all devices and in host memory. See `Tenant.owner`.

    The tenants of one owner have equal parts of its quota, in this sense: one that uses more gives way to one that
    needs room, as far as its tensors can be sent again.

    Args:
        shared: What owners use in other processes, which counts as well; None if there are none. Parts are those of the
            tenants in this process.
    """

    def __init__(self, shared: SharedQuotas | None = None) -> None:
        self._shared = shared
        self._used_bytes: Counter[Hashable] = Counter()  # by owner
        self._tenants: dict[Hashable, Counter[Tenant]] = {}  # what each tenant of an owner uses

    def used_bytes(self, tenant: Tenant) -> int:
        """Return how much of its quota a tenant's owner uses, in all processes."""
        others_bytes = 0
        if self._shared is not None and tenant.shared_key:
            others_bytes = sum(self._shared.used_by_others(tenant.shared_key))
        return self._used_bytes[tenant.owner] + others_bytes

    def have_room(self, tenant: Tenant, size_bytes: int) -> bool:
        """Return whether the quota of a tenant's owner has room for that many more bytes."""
        return self.used_bytes(tenant) + size_bytes <= tenant.quota_bytes

    def is_within_part(self, tenant: Tenant, size_bytes: int) -> bool:
        """Return whether a tenant would be within its part with that many more bytes."""
        return self._tenants_like(tenant)[tenant] + size_bytes <= self._part(tenant)

    def exceeds_part(self, other: Tenant, tenant: Tenant) -> bool:
        """Return whether another tenant of the same owner uses more than its part, as a tenant sees that needs room."""
        return self._tenants_like(tenant)[other] > self._part(tenant)

    def take(self, tenant: Tenant, size_bytes: int) -> bool:
        """Charge bytes to the quota of a tenant's owner, if it has room for them. Return whether it has."""
        if not self.have_room(tenant, size_bytes):
            return False
        self._used_bytes[tenant.owner] += size_bytes
        self._tenants.setdefault(tenant.owner, Counter())[tenant] += size_bytes
        # looked at again once the others can see it: one of them may have taken the room in between
        if self._publish(tenant) and self.have_room(tenant, 0):
            return True
        self.give_back(tenant, size_bytes)
        return False

    def give_back(self, tenant: Tenant, size_bytes: int) -> None:
        """Take back a charge."""
        owner = tenant.owner
        tenants = self._tenants[owner]
        self._used_bytes[owner] -= size_bytes
        tenants[tenant] -= size_bytes
        if not tenants[tenant]:
            del tenants[tenant]
        if not tenants:
            del self._used_bytes[owner], self._tenants[owner]
        self._publish(tenant)

    def _publish(self, tenant: Tenant) -> bool:
        """Tell other processes what a tenant's owner uses here. Return whether that is possible."""
        if self._shared is None or not tenant.shared_key:
            return True
        return self._shared.publish(tenant.shared_key, self._used_bytes[tenant.owner])

    def _tenants_like(self, tenant: Tenant) -> Counter[Tenant]:
        """Return what each tenant of a tenant's owner uses."""
        return self._tenants.get(tenant.owner, Counter())

    def _part(self, tenant: Tenant) -> int:
        tenants = self._tenants_like(tenant)
        return tenant.quota_bytes // (len(tenants) + (tenant not in tenants))
