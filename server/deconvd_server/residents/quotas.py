"""How many bytes a resident tensor is charged for, and how much of its quota each tenant uses.

No I/O and no locks: the registry's lock guards it.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from deconvd.model.problem import TensorSpec
from deconvd_server.residents.tenant import Tenant

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
    """How many bytes of its quota each tenant uses, on all devices and in host memory."""

    def __init__(self) -> None:
        self._used_bytes: Counter[Tenant] = Counter()

    def used_bytes(self, tenant: Tenant) -> int:
        return self._used_bytes[tenant]

    def have_room(self, tenant: Tenant, size_bytes: int) -> bool:
        """Return whether a tenant's quota has room for that many more bytes."""
        return self._used_bytes[tenant] + size_bytes <= tenant.quota_bytes

    def take(self, tenant: Tenant, size_bytes: int) -> None:
        """Charge bytes to a tenant's quota."""
        self._used_bytes[tenant] += size_bytes

    def give_back(self, tenant: Tenant, size_bytes: int) -> None:
        """Take back a charge."""
        self._used_bytes[tenant] -= size_bytes
        if not self._used_bytes[tenant]:
            del self._used_bytes[tenant]
