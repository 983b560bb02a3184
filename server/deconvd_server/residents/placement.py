"""Where kept tensors lie: on devices, or in host memory when there is no room there; and what makes room for what."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum, auto
from functools import partial
from itertools import chain, islice
from operator import attrgetter

import numpy as np

from deconvd.errors import ExhaustedError, UnavailableError
from deconvd.model.problem import TensorSpec
from deconvd.wire.cache_state import CacheState
from deconvd_server.call.context import CallContext
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine.engine import Engine
from deconvd_server.residents.elements import read_array
from deconvd_server.residents.entry import RETRY_AFTER_S, MemoryTier, ResidentEntry
from deconvd_server.residents.garbage import Garbage, free_operand
from deconvd_server.residents.growth import Growth
from deconvd_server.residents.quotas import Quotas, counted_bytes
from deconvd_server.residents.tenant import Tenant
from deconvd_server.residents.uses import ResidentUses

__all__ = ["Placement"]

_POLL_PERIOD_S = 0.05
"""How often one who waits for memory that is being freed looks whether its call is still wanted."""

_SPILL_CANDIDATES_COUNT = 16
"""Tensors of which host memory is asked whether it has room: where it has none for these, it is full."""

_BATCH_COUNT = 64
"""Tensors that are dropped while the lock is held: others wait for less than a millisecond, however many there are."""

_SHARE_WAIT_S = 1.0
"""How long one who asks for no more than its share waits for calls that use what others have beyond theirs."""

_CHARGED_BYTES = attrgetter("charged_bytes")
_DEVICE_BYTES = attrgetter("device_bytes")
_OWN_TENANT = attrgetter("tenant")

_log = logging.getLogger(__name__)


class _EvictionOutcome(Enum):
    """What becomes of a tensor that makes room on its device."""

    DROPPED = auto()
    SPILLED = auto()
    UNDECIDED = auto()  # host memory has made some room for it, but not enough yet


class Placement:
    """Shelves for kept tensors, one for each device and one in host memory. Thread-safe.

    It decides under a lock, and moves and frees outside it. A tensor that someone uses stays where
    it is, unless all its users rest. Room is made by what was used least recently of what nobody
    uses, in steps between which the lock is free; see `Shelf.displaceable`.

    Attributes:
        uses: The calls that use tensors.

    Args:
        engines: Whose devices tensors are kept on.
        changed: The lock; what is freed is notified.
        quotas: Of tenants, guarded by the lock.
        forget: Called, under the lock, with a tensor that is about to be dropped to make room: lets
            nothing stand for it any more.
        limit_bytes: Returns what may lie on an engine's device.
        host_bytes: What may lie in host memory of what devices with memory of their own have no
            room for.
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
        self._quotas = quotas
        self._forget = forget
        self._host_tier = MemoryTier(host_bytes, None)
        self.uses = ResidentUses()
        self._garbage = Garbage(changed, quotas)
        self._growth = Growth(changed, quotas)
        self.sweep = self._garbage.sweep
        self._on_unused = self._garbage.add  # one object for all tensors
        self._tiers: dict[str, MemoryTier] = {}
        for engine in engines:
            below = self._host_tier if engine.info.has_own_memory else None
            shelf = self._tiers[engine.info.id] = MemoryTier(limit_bytes(engine), engine, below)
            engine.on_shortage = partial(self._make_room_for_call, shelf)

    def make(
        self, tenant: Tenant, spec: TensorSpec, engine: Engine, call: CallContext
    ) -> ResidentEntry:
        """Return a new tensor on an engine's device, with any elements. The caller is its user.

        Raises:
            ExhaustedError: What may be kept there is kept already, and cannot be displaced.
            UnavailableError: Calls take the memory now, or use what would make room in the tenant's share.
        """
        shelf = self._tiers[engine.info.id]
        operand = self._allocate_reserved(shelf, tenant, spec, call, _SHARE_WAIT_S)
        kept = ResidentEntry(tenant, spec, shelf, operand, self._on_unused)
        self._growth.allow_growth(kept, operand, shelf)
        with self._changed:
            shelf.add(kept)
            kept.acquire()
        return kept

    def operand(self, kept: ResidentEntry, engine: Engine, call: CallContext) -> Tensor:
        """Return the elements of a tensor that the caller uses, as an operand for an engine.

        What lies on another device is copied through the host. What lies in host memory is brought
        back if there is room for it, and used from there if not.
        """
        shelf = self._tiers[engine.info.id]
        with self._changed:
            if kept.tier is shelf:
                kept.tenant.hits[shelf] += 1
                return kept.operand
            kept.tenant.misses[shelf] += 1
            is_brought = kept.tier.engine is None and kept.users_count == 1
            kept.is_moving = is_brought
        if is_brought:
            self._restore_spilled(kept, shelf, call)
        return kept.operand if kept.tier is shelf else read_array(kept, call)

    def drop(self, kept: ResidentEntry) -> None:
        """Drop a tensor, under the lock: at once if all its users rest. `sweep` frees it."""
        self._forget(kept)
        kept.revoke()

    def cache_states(self, engine: Engine, tenant: Tenant | None) -> list[CacheState]:
        """Return what a tenant has on an engine's device now, and beneath it; nothing for None."""
        shelf = self._tiers[engine.info.id]
        with self._changed:
            states = [shelf.cache_state("resident tensors", tenant)]
            if shelf.lower_tier is not None:
                states.append(
                    shelf.lower_tier.cache_state("resident tensors in host memory", tenant)
                )
        return states

    # Room

    def _allocate_reserved(
        self,
        shelf: MemoryTier,
        tenant: Tenant,
        spec: TensorSpec,
        call: CallContext,
        wait_s: float = 0,
    ) -> DeviceTensor:
        """Return memory of a device that was counted as taken. See `_reserve_room`."""
        size_bytes = counted_bytes(spec)
        self._reserve_room(shelf, tenant, size_bytes, call, wait_s)
        try:
            return self._allocate(shelf, tenant, spec)
        except BaseException:
            with self._changed:
                shelf.cancel_reservation(tenant, size_bytes)
                shelf.note_freed(size_bytes)
            raise

    def _reserve_room(
        self, shelf: MemoryTier, tenant: Tenant, size_bytes: int, call: CallContext, wait_s: float
    ) -> None:
        """Count room as taken once there is some.

        Args:
            wait_s: How long to wait for what is promised to the tenant, while others' calls use it.
        """
        until_s = time.monotonic() + wait_s
        while True:
            call.check()
            with self._changed:
                if shelf.fits(size_bytes):
                    shelf.reserve(tenant, size_bytes)
                    return
                if shelf.will_fit(size_bytes):
                    self._changed.wait(_POLL_PERIOD_S)
                    continue
                is_promised = wait_s > 0 and shelf.is_within_share(size_bytes, tenant)
                is_late = time.monotonic() >= until_s
                if shelf.can_make_room(size_bytes, tenant, is_promised and not is_late):
                    victims = shelf.evictable(tenant, is_promised and not is_late)
                    wanted_bytes = shelf.lacking_bytes(size_bytes)
                    moving, _ = self._start_eviction(victims, wanted_bytes, _CHARGED_BYTES)
                elif not is_promised:
                    raise _no_room_error(shelf, size_bytes)
                elif is_late:
                    raise _no_room_yet_error(shelf, size_bytes)
                else:
                    moving = None
                    self._changed.wait(_POLL_PERIOD_S)
            self._finish_eviction(moving)
            if is_promised:
                self.uses.stop_stalled(lambda kept: shelf.blocks_share(kept, tenant))

    def _allocate(self, shelf: MemoryTier, tenant: Tenant, spec: TensorSpec) -> DeviceTensor:
        """Return memory of a device, of which calls may have taken what kept tensors left.

        Others make room for it then too, but no more than it takes: they would do so in vain.
        """
        lacking_bytes = spec.nbytes
        while True:
            try:
                return shelf.device_engine.empty(spec)
            except ExhaustedError as error:
                with self._changed:
                    victims = shelf.evictable(tenant)
                    first = next(victims, None)
                    if first is None or lacking_bytes <= 0:
                        raise UnavailableError(str(error), retry_after_s=RETRY_AFTER_S) from None
                    moving, freed_bytes = self._start_eviction(
                        chain([first], victims), lacking_bytes
                    )
                self._finish_eviction(moving)
                lacking_bytes -= freed_bytes

    def _make_room_for_call(self, shelf: MemoryTier, size_bytes: int, call: CallContext) -> None:
        """Displace tensors so that a call may take so many bytes more.

        What another tenant has within its share is moved to host memory for it, but not dropped.
        """
        while size_bytes > 0:
            call.check()
            with self._changed:
                tenant = call.tenant
                victims = chain(shelf.evictable(tenant), self._spillable(shelf, tenant))
                first = next(victims, None)
                if first is None:
                    return
                moving, freed_bytes = self._start_eviction(
                    chain([first], victims), size_bytes, for_whom=lambda _: call.tenant
                )
            self._finish_eviction(moving)
            size_bytes -= freed_bytes

    def _spillable(self, shelf: MemoryTier, tenant: object) -> Iterator[ResidentEntry]:
        """Yield a few tensors that host memory has room for, if it drops what it may for a tenant."""
        below = shelf.lower_tier
        if below is not None:
            for kept in shelf.least_recently_used(_SPILL_CANDIDATES_COUNT):
                if kept.is_idle and below.can_make_room(kept.size_bytes, tenant):
                    yield kept

    # Moves

    def _start_eviction(
        self,
        victims: Iterable[ResidentEntry],
        size_bytes: int,
        bytes_of: Callable[[ResidentEntry], int] = _DEVICE_BYTES,
        *,
        for_whom: Callable[[ResidentEntry], object] = _OWN_TENANT,
    ) -> tuple[ResidentEntry | None, int]:
        """Take a step, under the lock, to displace tensors: drop some, or begin to move one.

        Args:
            size_bytes: What is to be freed; it may take more steps than this one.
            bytes_of: Returns what a tensor frees.
            for_whom: Returns the tenant for which host memory may drop something in turn, to take a
                tensor; None for nobody.

        Returns:
            The tensor that is to be moved, for `_finish_eviction`, and what the step frees, in bytes.
        """
        freed_bytes = 0
        for kept in islice(victims, _BATCH_COUNT):
            fate = self._decide_eviction(kept, for_whom(kept))
            if fate is _EvictionOutcome.UNDECIDED:
                break
            freed_bytes += bytes_of(kept)
            if fate is _EvictionOutcome.SPILLED:
                return kept, freed_bytes
            self.drop(kept)
            if freed_bytes >= size_bytes:
                break
        return None, freed_bytes

    def _decide_eviction(self, kept: ResidentEntry, tenant: object) -> _EvictionOutcome:
        """Begin, under the lock, to move a tensor down if it may; let host memory make room for it."""
        below = kept.tier.lower_tier
        if below is None or not kept.is_live or not below.can_make_room(kept.size_bytes, tenant):
            return _EvictionOutcome.DROPPED
        for lower in islice(below.evictable(tenant), _BATCH_COUNT):
            if below.will_fit(kept.size_bytes):
                break
            self.drop(lower)
        if not below.will_fit(kept.size_bytes):
            return _EvictionOutcome.UNDECIDED
        below.reserve(kept.tenant, kept.size_bytes)
        kept.tier.evicting_bytes += kept.charged_bytes
        kept.acquire()
        kept.is_moving = True
        return _EvictionOutcome.SPILLED

    def _finish_eviction(self, moving: ResidentEntry | None) -> None:
        """Do, outside the lock, what a step has begun."""
        if moving is not None:
            self._spill(moving)
        self.sweep()

    def _spill(self, kept: ResidentEntry) -> None:
        """Copy a tensor, whose other users rest, to host memory; drop it if that fails."""
        above, below, operand = kept.tier, self._host_tier, kept.operand
        assert not isinstance(operand, np.ndarray)
        try:
            array = above.device_engine.allocate_host_array(kept.spec)
            above.device_engine.read(operand, CallContext(), array)
        except Exception as error:  # noqa: BLE001 - whatever it is, the tensor is dropped instead
            _log.warning("a kept tensor is dropped: it cannot be moved to the host", exc_info=error)
            with self._changed:
                above.evicting_bytes -= (
                    kept.charged_bytes
                )  # from here on as for any that is dropped
                below.cancel_reservation(kept.tenant, kept.size_bytes)
                below.note_freed(kept.size_bytes)
                self.drop(kept)
                self._finish_move(kept)
                kept.release()
            return
        grown_bytes = kept.grown_bytes
        with self._changed:
            above.evicting_bytes -= kept.charged_bytes  # which it does now
            self._change_tier(kept, below, array)
        free_operand(above, operand, grown_bytes)
        with self._changed:
            above.note_freed(kept.size_bytes + grown_bytes)
            kept.release()
            self._finish_move(kept)

    def _restore_spilled(self, kept: ResidentEntry, shelf: MemoryTier, call: CallContext) -> None:
        """Move a tensor, of which the caller is the only user, to a device if that has room."""
        with self._changed:
            self._host_tier.evicting_bytes += kept.size_bytes  # for what it displaces
        try:
            operand = self._allocate_reserved(shelf, kept.tenant, kept.spec, call)
            try:
                shelf.device_engine.write(operand, read_array(kept, call), call)
            except BaseException:
                self._free_unused(shelf, kept, operand)
                raise
            self._growth.allow_growth(kept, operand, shelf)
            with self._changed:
                self._change_tier(kept, shelf, operand)
                self._host_tier.note_freed(kept.size_bytes)
        except (ExhaustedError, UnavailableError):
            return  # it is as good where it is
        finally:
            with self._changed:
                self._host_tier.evicting_bytes -= kept.size_bytes
                self._finish_move(kept)

    def _free_unused(self, shelf: MemoryTier, kept: ResidentEntry, operand: DeviceTensor) -> None:
        """Free memory that was taken for a tensor which does not come."""
        free_operand(shelf, operand)
        with self._changed:
            shelf.cancel_reservation(kept.tenant, kept.size_bytes)
            shelf.note_freed(kept.size_bytes)

    def _change_tier(self, kept: ResidentEntry, shelf: MemoryTier, operand: Tensor) -> None:
        """Let a tensor lie elsewhere, under the lock. Its old memory is still to be freed, and to have `left`."""
        kept.tier.remove(kept)
        self._quotas.give_back(kept.tenant, kept.grown_bytes)
        kept.grown_bytes = 0
        kept.tier, kept.operand = shelf, operand
        shelf.add(kept)

    def _finish_move(self, kept: ResidentEntry) -> None:
        kept.is_moving = False
        self._changed.notify_all()


def _no_room_error(shelf: MemoryTier, size_bytes: int) -> ExhaustedError:
    return ExhaustedError(
        f"{shelf.device_engine.info.id} has {shelf.limit_bytes} bytes for tensors that stay, and beside "
        "what calls use of them and what other tenants have within their share, there is no room "
        f"for {size_bytes} more"
    )


def _no_room_yet_error(shelf: MemoryTier, size_bytes: int) -> UnavailableError:
    return UnavailableError(
        f"{shelf.device_engine.info.id} has {shelf.limit_bytes} bytes for tensors that stay, and calls use "
        f"what is to make room for {size_bytes} more: they are within the tenant's share",
        retry_after_s=RETRY_AFTER_S,
    )
