"""A tensor that is kept, and the bounded memory that such tensors lie in. No I/O, and no locks: the keeper's."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator

import numpy as np

from deconvd.cache_state import CacheState
from deconvd.problem import TensorSpec
from deconvd_server.cache import Entry, Resource, State
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine import Engine
from deconvd_server.residents.tenant import Session, Tenant

__all__ = ["Kept", "Quotas", "Shelf", "counted_bytes"]

_LEAST_BYTES = 512
"""What the smallest tensor counts for: it takes as much of a card's memory, and some of the host's."""


def counted_bytes(spec: TensorSpec) -> int:
    """Return what a tensor counts for against limits and quotas."""
    return max(spec.nbytes, _LEAST_BYTES)


class Kept:
    """A tensor that is kept, or is being made to be.

    Args:
        on_unused: Called with the tensor once it is retired and nobody uses it any more.

    Attributes:
        shelf: Where it lies.
        operand: Its elements there.
        life: Its users are the calls that need it where it is, and who moves it. It is retired when
            nothing stands for it any more, or to make room.
        grown_bytes: What the device keeps with it beside its elements.
        is_moving: Whether it is on its way from one shelf to another: it gets no users meanwhile.
        names: The names that stand for it, each with the session that it was given to.
        content_key: What stands for it among its tenant's contents; None if nothing does.
    """

    def __init__(
        self,
        tenant: Tenant,
        spec: TensorSpec,
        shelf: Shelf,
        operand: Tensor,
        on_unused: Callable[[Kept], None],
    ) -> None:
        self.tenant = tenant
        self.spec = spec
        self.shelf = shelf
        self.operand = operand
        self.size_bytes = counted_bytes(spec)
        self.life = Entry(Resource(self, self.size_bytes), lambda _: on_unused(self))
        self.grown_bytes = 0
        self.is_moving = False
        self.names: dict[bytes, Session] = {}
        self.content_key: Hashable | None = None

    @property
    def device_tensor(self) -> DeviceTensor:
        """Its elements, which lie on a device: as they do from its making until its maker releases it."""
        if isinstance(self.operand, np.ndarray):
            raise RuntimeError("the tensor lies in host memory")
        return self.operand

    @property
    def held_bytes(self) -> int:
        """What it counts for where it lies."""
        return self.size_bytes + self.grown_bytes

    @property
    def is_live(self) -> bool:
        """Whether it can be named, and get users."""
        return self.life.state is State.LIVE

    @property
    def is_idle(self) -> bool:
        """Whether it is live and nobody uses it."""
        return self.is_live and not self.life.users_count


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


class Shelf:
    """Memory for kept tensors, bounded: who has how much of it, and what was used least recently.

    Args:
        engine: Whose device's memory it is; None for the host's.
        below: Where tensors go when there is no room for them here; None if they are dropped then.

    Attributes:
        used_bytes: What the tensors here take, those that are being freed and room that was taken
            for others included.
        leaving_bytes: The part of it that is being freed.
        hits_count: Times that a tensor was here when it was needed here.
        misses_count: Times that it had to be brought.
    """

    def __init__(self, limit_bytes: int, engine: Engine | None, below: Shelf | None = None) -> None:
        self.limit_bytes = limit_bytes
        self.engine = engine
        self.below = below
        self.used_bytes = 0
        self.leaving_bytes = 0
        self.hits_count = 0
        self.misses_count = 0
        self._by_use: OrderedDict[Kept, None] = OrderedDict()
        self._bytes_by_tenant: Counter[Tenant] = Counter()

    def fits(self, size_bytes: int) -> bool:
        """Return whether there is room for so much more."""
        return self.used_bytes + size_bytes <= self.limit_bytes

    def will_fit(self, size_bytes: int) -> bool:
        """Return whether there will be once all that leaves has left."""
        return self.used_bytes - self.leaving_bytes + size_bytes <= self.limit_bytes

    def can_have_room(self, size_bytes: int, tenant: object) -> bool:
        """Return whether there would be room for so much more without all that is `displaceable`."""
        lacking_bytes = self.used_bytes - self.leaving_bytes + size_bytes - self.limit_bytes
        displaceable = self.displaceable(tenant)
        while lacking_bytes > 0:
            kept = next(displaceable, None)
            if kept is None:
                return False
            lacking_bytes -= kept.held_bytes
        return True

    def take(self, tenant: Tenant, size_bytes: int) -> None:
        """Count room as a tenant's, for what is about to come."""
        self.used_bytes += size_bytes
        self._bytes_by_tenant[tenant] += size_bytes

    def put(self, kept: Kept) -> None:
        """Let a tensor lie here, for which room was taken."""
        self._by_use[kept] = None

    def leave(self, kept: Kept) -> None:
        """Let a tensor lie here no more. Its room is free once it has `left`."""
        del self._by_use[kept]
        self.leave_unused(kept.tenant, kept.held_bytes)

    def leave_unused(self, tenant: Tenant, size_bytes: int) -> None:
        """Give up room that was taken for what has not come."""
        self.leaving_bytes += size_bytes
        self._bytes_by_tenant[tenant] -= size_bytes
        if not self._bytes_by_tenant[tenant]:
            del self._bytes_by_tenant[tenant]

    def left(self, size_bytes: int) -> None:
        """Count room that was given up as free: its memory is."""
        self.used_bytes -= size_bytes
        self.leaving_bytes -= size_bytes

    def touch(self, kept: Kept) -> None:
        """Note that a tensor was used."""
        self._by_use.move_to_end(kept)

    def displaceable(self, tenant: object) -> Iterator[Kept]:
        """Yield the idle tensors that may make room, the least recently used first.

        Those are the tenant's own, and those of tenants that have more than their share: the same
        for each that has, or asks for, room here.

        Args:
            tenant: For whom; None for a call without one.
        """
        tenants = {*self._bytes_by_tenant, tenant} - {None}
        share_bytes = self.limit_bytes // max(len(tenants), 1)
        for kept in self._by_use:
            is_own = kept.tenant is tenant
            if kept.is_idle and (is_own or self._bytes_by_tenant[kept.tenant] > share_bytes):
                yield kept

    def state(self, name: str) -> CacheState:
        """Return what lies here now."""
        return CacheState(
            name=name,
            count=len(self._by_use),
            size_bytes=self.used_bytes,
            limit_bytes=self.limit_bytes,
            hits_count=self.hits_count,
            misses_count=self.misses_count,
        )

    def idle(self) -> Iterator[Kept]:
        """Yield the tensors that nobody uses, the least recently used first."""
        return (kept for kept in self._by_use if kept.is_idle)
