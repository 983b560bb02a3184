"""What tensors that stay count for, and what each tenant has of its quota. No I/O, and no locks: the keeper's."""

from __future__ import annotations

from collections import Counter
from typing import Final

from deconvd.model.problem import TensorSpec
from deconvd_server.residents.tenant import Tenant

__all__ = ["Quotas", "counted_bytes", "names_limit"]

_OBJECTS_BYTES: Final = 2560
"""What a tensor counts for beside its elements: the objects that stand for it, a name and a content take that much of
the server's own memory: measured 1.6 KiB on the processor, reckoned 2.5 on a card's host."""

_SMALL_BYTES: Final = 16 << 10
"""From here on a tensor counts for its elements alone: the rest is less than a sixth of them."""

_NAME_BYTES: Final = 320
"""What one more name of a tensor takes, at most."""


def counted_bytes(spec: TensorSpec) -> int:
    """Return what a tensor counts for against limits and quotas."""
    return max(spec.nbytes, min(spec.nbytes + _OBJECTS_BYTES, _SMALL_BYTES))


def names_limit(spec: TensorSpec) -> int:
    """Return how many names a tensor may have at once: together they take no more than it counts for."""
    return counted_bytes(spec) // _NAME_BYTES


class Quotas:
    """What each tenant keeps, wherever that is, of what it may."""

    def __init__(self) -> None:
        self._used_bytes: Counter[Tenant] = Counter()

    def used_bytes(self, tenant: Tenant) -> int:
        """Return what a tenant keeps."""
        return self._used_bytes[tenant]

    def have_room(self, tenant: Tenant, size_bytes: int) -> bool:
        """Return whether a tenant may keep that many bytes more."""
        return self._used_bytes[tenant] + size_bytes <= tenant.quota_bytes

    def take(self, tenant: Tenant, size_bytes: int) -> None:
        """Count bytes as a tenant's."""
        self._used_bytes[tenant] += size_bytes

    def give_back(self, tenant: Tenant, size_bytes: int) -> None:
        """Count bytes as a tenant's no more."""
        self._used_bytes[tenant] -= size_bytes
        if not self._used_bytes[tenant]:
            del self._used_bytes[tenant]
