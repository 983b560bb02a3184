"""Where resident tensors are: on a device, or spilled to host memory; and which of them make room for others.

Locks: one lock, the registry's (`changed`), guards all state here. No device, engine, call context or session is
called with it held, since those have locks of their own. Calls use `make` and `operand`, the registry uses the other
methods, and an engine calls `_make_room_for_call` from a call's thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum, auto
from functools import partial
from itertools import chain, islice

import numpy as np

from deconvd.errors import DeconvdError, ExhaustedError, UnavailableError
from deconvd.model.problem import TensorSpec
from deconvd.wire.cache_state import CacheState
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine.engine import Engine
from deconvd_server.residents.elements import read_array
from deconvd_server.residents.entry import RETRY_AFTER_S, MemoryTier, ResidentEntry
from deconvd_server.residents.garbage import Garbage, free_operand
from deconvd_server.residents.quotas import Quotas, counted_bytes
from deconvd_server.residents.tenant import Tenant, tenant_of
from deconvd_server.residents.uses import ResidentUses

__all__ = ["Placement"]

_POLL_PERIOD_S = 0.05
"""How often a thread that waits for memory to be freed checks whether its call is still wanted."""

_SPILL_CANDIDATES_COUNT = 16
"""How many tensors are tried for spilling: if host memory has no room for any of these, it counts as full."""

_BATCH_COUNT = 64
"""Largest number of tensors dropped while the lock is held: other threads wait for less than a millisecond."""

_SHARE_WAIT_S = 1.0
"""How long a tenant within its share waits for calls that use what other tenants have beyond their shares."""

_log = logging.getLogger(__name__)


class _EvictionOutcome(Enum):
    """What happens to a tensor that must leave its tier."""

    DROPPED = auto()
    SPILLED = auto()
    UNDECIDED = auto()  # host memory has dropped a batch for it, and needs to drop more


class Placement:
    """Decides in which memory each resident tensor is: one tier for each device, and one in host memory. Thread-safe.

    It decides with the lock held, and copies and frees without it:

        lock held: _start_eviction drops a batch, or marks one tensor as moving
        no lock:   _finish_eviction copies that tensor to host memory, and frees what was dropped
        ... again, until there is room

    A tensor that has users is not evicted, unless all of them rest. Of the others, the least recently
    used goes first: see `MemoryTier.evictable`.

    Attributes:
        uses: The calls that use resident tensors.

    Args:
        changed: The registry's lock. It is notified when memory has been freed.
        forget: Called, with the lock held, with a tensor that is about to be dropped. Removes its names and content.
        limit_bytes: Returns how many bytes of tensors an engine's device may have.
        host_bytes: How many bytes may be spilled to host memory.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        changed: threading.Condition,
        quotas: Quotas,
        forget: Callable[[ResidentEntry], None],
        *,
        limit_bytes: Callable[[Engine], int],
        host_bytes: int,
    ) -> None:
        self._changed = changed
        self._forget = forget
        self._host_tier = MemoryTier(host_bytes, None)
        self.uses = ResidentUses()
        self._garbage = Garbage(changed, quotas)
        self.sweep = self._garbage.sweep
        self._on_unused = self._garbage.add  # one object, which all tensors share
        self._tiers: dict[str, MemoryTier] = {}  # by the device's id, or ``host``
        for engine in engines:
            lower = self._host_tier if engine.info.has_own_memory else None
            tier = self._tiers[engine.info.id] = MemoryTier(limit_bytes(engine), engine, lower)
            engine.on_shortage = partial(self._make_room_for_call, tier)
            if lower is not None:
                self._tiers["host"] = lower

    def make(
        self, tenant: Tenant, spec: TensorSpec, engine: Engine, call: CallContext
    ) -> ResidentEntry:
        """Return a new tensor on an engine's device, with undefined elements. The caller is its user.

        Raises:
            ExhaustedError: The tier is full, and evicting what may be evicted would not make enough room.
            UnavailableError: Calls use the memory now, or use tensors that would make room within the tenant's share.
        """
        tier = self._tiers[engine.info.id]
        operand = self._allocate_reserved(tier, tenant, spec, call, _SHARE_WAIT_S)
        entry = ResidentEntry(tenant, spec, tier, operand, self._on_unused)
        with self._changed:
            tier.add(entry)
            entry.acquire()
        return entry

    def operand(self, entry: ResidentEntry, engine: Engine, call: CallContext) -> Tensor:
        """Return the elements of a tensor, which the caller uses, as an operand for an engine.

        A tensor on another device is copied through host memory. A spilled tensor is moved back to the
        device if there is room, and is used from host memory if not.
        """
        tier = self._tiers[engine.info.id]
        with self._changed:
            if entry.tier is tier:
                tier.note_hit(entry.tenant)
                return entry.operand
            tier.note_miss(entry.tenant)
            # only if no other call uses it: a tensor must not move under another user
            is_restored = entry.tier.engine is None and entry.users_count == 1
            entry.is_moving = is_restored
        if is_restored:
            self._restore_spilled(entry, tier, call)
        return entry.operand if entry.tier is tier else read_array(entry, call)

    def drop(self, entry: ResidentEntry) -> None:
        """Drop a tensor: at once if it has no users or all of them rest, else after its last user.

        The caller holds the lock, and calls `sweep` after releasing it.
        """
        self._forget(entry)
        entry.revoke()

    def cache_states(self, engine: Engine, tenant: Tenant | None) -> list[CacheState]:
        """Return what a tenant has on an engine's device, and of it in host memory; zeros if the tenant is None."""
        tier = self._tiers[engine.info.id]
        with self._changed:
            return [each.cache_state(tenant) for each in (tier, tier.lower_tier) if each]

    def whole_states(self) -> dict[str, CacheState]:
        """Return what all tenants together have on each device, by its id, and on the ``host`` if it takes any."""
        with self._changed:
            return {place: tier.whole_state() for place, tier in self._tiers.items()}

    # Making room

    def _allocate_reserved(
        self,
        tier: MemoryTier,
        tenant: Tenant,
        spec: TensorSpec,
        call: CallContext,
        wait_s: float = 0,
    ) -> DeviceTensor:
        """Reserve room in a device's tier, and return memory of the device for it. See `_reserve_room`."""
        size_bytes = counted_bytes(spec)
        self._reserve_room(tier, tenant, size_bytes, call, wait_s)
        try:
            return self._allocate(tier, tenant, spec)
        except BaseException:
            with self._changed:
                tier.cancel_reservation(tenant, size_bytes)
                tier.note_freed(size_bytes)
            raise

    def _reserve_room(
        self, tier: MemoryTier, tenant: Tenant, size_bytes: int, call: CallContext, wait_s: float
    ) -> None:
        """Reserve bytes of a tier, and evict tensors until there is room for them.

        Args:
            wait_s: How long a tenant within its share waits for other tenants' calls. Meanwhile only tensors
                of tenants beyond their shares are evicted, not its own.
        """
        until_s = time.monotonic() + wait_s
        while True:
            call.check()
            with self._changed:
                if tier.fits(size_bytes):
                    tier.reserve(tenant, size_bytes)
                    return
                if tier.will_fit(size_bytes):  # another thread is freeing enough
                    self._changed.wait(_POLL_PERIOD_S)
                    continue
                is_within_share = wait_s > 0 and tier.is_within_share(size_bytes, tenant)
                may_wait = is_within_share and time.monotonic() < until_s
                moving = None
                if tier.can_make_room(size_bytes, tenant, may_wait):
                    moving, _ = self._start_eviction(
                        tier.evictable(tenant, may_wait),
                        tier.lacking_bytes(size_bytes),
                        bytes_of=lambda entry: entry.size_bytes,
                    )
                elif not may_wait:
                    raise _no_room_error(tier, size_bytes, is_within_share)
                else:  # calls use what must make room: wait for them, and stop those that are stalled
                    self._changed.wait(_POLL_PERIOD_S)
            self._finish_eviction(moving)
            if is_within_share:
                self.uses.stop_stalled(lambda entry: tier.blocks_share(entry, tenant))

    def _allocate(self, tier: MemoryTier, tenant: Tenant, spec: TensorSpec) -> DeviceTensor:
        """Return memory of a device, after evicting more if calls have taken what the eviction freed.

        At most the size of the tensor is evicted for this: calls may take all memory again and again.
        """
        lacking_bytes = spec.nbytes
        while True:
            try:
                return tier.device_engine.empty(spec)
            except ExhaustedError as error:
                with self._changed:
                    victims = tier.evictable(tenant)
                    first = next(victims, None)
                    if first is None or lacking_bytes <= 0:
                        raise UnavailableError(str(error), retry_after_s=RETRY_AFTER_S) from None
                    moving, freed_bytes = self._start_eviction(
                        chain([first], victims), lacking_bytes
                    )
                self._finish_eviction(moving)
                lacking_bytes -= freed_bytes

    def _make_room_for_call(self, tier: MemoryTier, size_bytes: int, call: CallContext) -> None:
        """Evict tensors from a device so that a call can have that many more bytes.

        A tensor within another tenant's share is only spilled for a call, never dropped.
        """
        tenant = tenant_of(call)
        while size_bytes > 0:
            call.check()
            with self._changed:
                victims = chain(tier.evictable(tenant), self._spillable(tier, tenant))
                first = next(victims, None)
                if first is None:
                    return
                moving, freed_bytes = self._start_eviction(
                    chain([first], victims), size_bytes, for_whom=lambda _: tenant
                )
            self._finish_eviction(moving)
            size_bytes -= freed_bytes

    def _spillable(self, tier: MemoryTier, tenant: Tenant | None) -> Iterator[ResidentEntry]:
        """Yield a few idle tensors that host memory can take, after it drops what it may for a tenant."""
        lower = tier.lower_tier
        if lower is not None:
            for entry in tier.least_recently_used(_SPILL_CANDIDATES_COUNT):
                if entry.is_idle and lower.can_make_room(entry.size_bytes, tenant):
                    yield entry

    # Eviction

    def _start_eviction(
        self,
        victims: Iterable[ResidentEntry],
        size_bytes: int,
        *,
        bytes_of: Callable[[ResidentEntry], int] = lambda entry: entry.spec.nbytes,
        for_whom: Callable[[ResidentEntry], Tenant | None] = lambda entry: entry.tenant,
    ) -> tuple[ResidentEntry | None, int]:
        """Take one step to evict tensors: drop a batch of them, or start to spill one. The caller holds the lock.

        Args:
            size_bytes: How many bytes must be freed. This may take more steps than one.
            bytes_of: Returns how many bytes evicting a tensor frees.
            for_whom: Returns the tenant for which host memory may drop tensors, to take this one; None for a
                call without a session.

        Returns:
            The tensor to spill, for `_finish_eviction`, or None; and how many bytes this step frees.
        """
        freed_bytes = 0
        for entry in islice(victims, _BATCH_COUNT):
            outcome = self._decide_eviction(entry, for_whom(entry))
            if outcome is _EvictionOutcome.UNDECIDED:
                break
            entry.tier.note_eviction(entry.tenant)
            freed_bytes += bytes_of(entry)
            if outcome is _EvictionOutcome.SPILLED:
                return entry, freed_bytes
            self.drop(entry)
            if freed_bytes >= size_bytes:
                break
        return None, freed_bytes

    def _decide_eviction(self, entry: ResidentEntry, tenant: Tenant | None) -> _EvictionOutcome:
        """Decide, with the lock held, whether a tensor is spilled or dropped; mark it as moving if it is spilled."""
        lower = entry.tier.lower_tier
        if lower is None or not entry.is_live or not lower.can_make_room(entry.size_bytes, tenant):
            return _EvictionOutcome.DROPPED
        for victim in islice(lower.evictable(tenant), _BATCH_COUNT):
            if lower.will_fit(entry.size_bytes):
                break
            lower.note_eviction(victim.tenant)
            self.drop(victim)
        if not lower.will_fit(entry.size_bytes):
            return _EvictionOutcome.UNDECIDED
        lower.reserve(entry.tenant, entry.size_bytes)
        entry.tier.evicting_bytes += entry.size_bytes  # until `_spill` removes it from its tier
        entry.acquire()
        entry.is_moving = True
        return _EvictionOutcome.SPILLED

    def _finish_eviction(self, moving: ResidentEntry | None) -> None:
        """Finish a step of `_start_eviction`. The caller must not hold the lock."""
        if moving is not None:
            self._spill(moving)
        self.sweep()

    def _spill(self, entry: ResidentEntry) -> None:
        """Copy a tensor, whose other users all rest, to host memory; drop it if that fails."""
        upper, lower, operand = entry.tier, self._host_tier, entry.operand
        assert not isinstance(operand, np.ndarray)
        try:
            array = upper.device_engine.allocate_host_array(entry.spec, is_lasting=True)
            upper.device_engine.read(operand, CallContext(), array)
        except Exception as error:  # noqa: BLE001 - whatever it is, the tensor is dropped instead
            _log.warning(
                "a resident tensor is dropped: copying it to host memory failed", exc_info=error
            )
            with self._changed:
                upper.evicting_bytes -= entry.size_bytes  # `drop` counts them again
                lower.cancel_reservation(entry.tenant, entry.size_bytes)
                lower.note_freed(entry.size_bytes)
                self.drop(entry)
                self._finish_move(entry)
                entry.release()
            return
        with self._changed:
            upper.evicting_bytes -= entry.size_bytes  # `_change_tier` counts them again
            self._change_tier(entry, lower, array)
        free_operand(upper, operand)
        with self._changed:
            upper.note_freed(entry.size_bytes)
            entry.release()
            self._finish_move(entry)

    def _restore_spilled(self, entry: ResidentEntry, tier: MemoryTier, call: CallContext) -> None:
        """Move a spilled tensor, whose only user is the caller, back to a device if that has room."""
        with self._changed:
            # what it evicts from the device may be spilled into the host memory that it leaves
            self._host_tier.evicting_bytes += entry.size_bytes
        try:
            operand = self._allocate_reserved(tier, entry.tenant, entry.spec, call)
            try:
                tier.device_engine.write(operand, read_array(entry, call), call)
            except BaseException:
                free_operand(tier, operand)
                with self._changed:
                    tier.cancel_reservation(entry.tenant, entry.size_bytes)
                    tier.note_freed(entry.size_bytes)
                raise
            with self._changed:
                self._change_tier(entry, tier, operand)
                self._host_tier.note_freed(entry.size_bytes)
        except (ExhaustedError, UnavailableError):
            return  # the device can use it from host memory, too
        finally:
            with self._changed:
                self._host_tier.evicting_bytes -= entry.size_bytes
                self._finish_move(entry)

    def _change_tier(self, entry: ResidentEntry, tier: MemoryTier, operand: Tensor) -> None:
        """Move a tensor's charge to another tier. The caller holds the lock.

        The caller then frees the old elements, and calls `note_freed` of the old tier.
        """
        entry.tier.remove(entry)
        entry.tier, entry.operand = tier, operand
        tier.add(entry)

    def _finish_move(self, entry: ResidentEntry) -> None:
        entry.is_moving = False
        self._changed.notify_all()


def _no_room_error(tier: MemoryTier, size_bytes: int, is_within_share: bool) -> DeconvdError:
    device = tier.device_engine.info.id
    text = f"{device} has {tier.limit_bytes} bytes for resident tensors, and no room for {size_bytes} more"
    if is_within_share:
        text += " yet: calls use the tensors that must make room within the tenant's share"
        return UnavailableError(text, retry_after_s=RETRY_AFTER_S)
    return ExhaustedError(f"{text}: calls and other tenants within their share use the rest")
