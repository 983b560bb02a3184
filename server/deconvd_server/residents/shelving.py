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

from deconvd.cache_state import CacheState
from deconvd.errors import ExhaustedError, UnavailableError
from deconvd.problem import TensorSpec
from deconvd_server.call import Call
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine import Engine
from deconvd_server.residents.counting import Quotas, counted_bytes
from deconvd_server.residents.elements import whole_array
from deconvd_server.residents.garbage import Garbage, free
from deconvd_server.residents.growth import Growth
from deconvd_server.residents.kept import RETRY_AFTER_S, Kept, Shelf
from deconvd_server.residents.tenant import Tenant
from deconvd_server.residents.uses import Uses

__all__ = ["Shelving"]

_WAIT_S = 0.05
"""How often one who waits for memory that is being freed looks whether its call is still wanted."""

_TRIED_COUNT = 16
"""Tensors of which host memory is asked whether it has room: where it has none for these, it is full."""

_STEP_COUNT = 64
"""Tensors that are dropped while the lock is held: others wait for less than a millisecond, however many there are."""

_PROMISED_WAIT_S = 1.0
"""How long one who asks for no more than its share waits for calls that use what others have beyond theirs."""

_COUNTED = attrgetter("held_bytes")
_ON_DEVICE = attrgetter("device_bytes")
_ITS_OWN = attrgetter("tenant")

_log = logging.getLogger(__name__)


class _Fate(Enum):
    """What becomes of a tensor that makes room on its device."""

    DROPPED = auto()
    MOVED = auto()
    UNDECIDED = auto()  # host memory has made some room for it, but not enough yet


class Shelving:
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
        forget: Callable[[Kept], None],
        *,
        limit_bytes: Callable[[Engine], int],
        host_bytes: int,
    ) -> None:
        self._changed = changed
        self._quotas = quotas
        self._forget = forget
        self._host = Shelf(host_bytes, None)
        self.uses = Uses()
        self._garbage = Garbage(changed, quotas)
        self._growth = Growth(changed, quotas)
        self.sweep = self._garbage.sweep
        self._on_unused = self._garbage.add  # one object for all tensors
        self._shelves: dict[str, Shelf] = {}
        for engine in engines:
            below = self._host if engine.info.has_own_memory else None
            shelf = self._shelves[engine.info.id] = Shelf(limit_bytes(engine), engine, below)
            engine.on_shortage = partial(self._make_room_for_call, shelf)

    def make(self, tenant: Tenant, spec: TensorSpec, engine: Engine, call: Call) -> Kept:
        """Return a new tensor on an engine's device, with any elements. The caller is its user.

        Raises:
            ExhaustedError: What may be kept there is kept already, and cannot be displaced.
            UnavailableError: Calls take the memory now, or use what would make room in the tenant's share.
        """
        shelf = self._shelves[engine.info.id]
        operand = self._taken(shelf, tenant, spec, call, _PROMISED_WAIT_S)
        kept = Kept(tenant, spec, shelf, operand, self._on_unused)
        self._growth.let_grow(kept, operand, shelf)
        with self._changed:
            shelf.put(kept)
            kept.acquire()
        return kept

    def operand(self, kept: Kept, engine: Engine, call: Call) -> Tensor:
        """Return the elements of a tensor that the caller uses, as an operand for an engine.

        What lies on another device is copied through the host. What lies in host memory is brought
        back if there is room for it, and used from there if not.
        """
        shelf = self._shelves[engine.info.id]
        with self._changed:
            if kept.shelf is shelf:
                kept.tenant.hits[shelf] += 1
                return kept.operand
            kept.tenant.misses[shelf] += 1
            is_brought = kept.shelf.engine is None and kept.users_count == 1
            kept.is_moving = is_brought
        if is_brought:
            self._bring_back(kept, shelf, call)
        return kept.operand if kept.shelf is shelf else whole_array(kept, call)

    def evict(self, kept: Kept) -> None:
        """Drop a tensor, under the lock: at once if all its users rest. `sweep` frees it."""
        self._forget(kept)
        kept.revoke()

    def states(self, engine: Engine, tenant: Tenant | None) -> list[CacheState]:
        """Return what a tenant has on an engine's device now, and beneath it; nothing for None."""
        shelf = self._shelves[engine.info.id]
        with self._changed:
            states = [shelf.state("resident tensors", tenant)]
            if shelf.below is not None:
                states.append(shelf.below.state("resident tensors in host memory", tenant))
        return states

    # Room

    def _taken(
        self, shelf: Shelf, tenant: Tenant, spec: TensorSpec, call: Call, wait_s: float = 0
    ) -> DeviceTensor:
        """Return memory of a device that was counted as taken. See `_take_room`."""
        size_bytes = counted_bytes(spec)
        self._take_room(shelf, tenant, size_bytes, call, wait_s)
        try:
            return self._allocated(shelf, tenant, spec)
        except BaseException:
            with self._changed:
                shelf.leave_unused(tenant, size_bytes)
                shelf.left(size_bytes)
            raise

    def _take_room(
        self, shelf: Shelf, tenant: Tenant, size_bytes: int, call: Call, wait_s: float
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
                    shelf.take(tenant, size_bytes)
                    return
                if shelf.will_fit(size_bytes):
                    self._changed.wait(_WAIT_S)
                    continue
                is_promised = wait_s > 0 and shelf.is_promised(size_bytes, tenant)
                is_late = time.monotonic() >= until_s
                if shelf.can_have_room(size_bytes, tenant, is_promised and not is_late):
                    victims = shelf.displaceable(tenant, is_promised and not is_late)
                    wanted_bytes = shelf.lacking_bytes(size_bytes)
                    moving, _ = self._displace(victims, wanted_bytes, _COUNTED)
                elif not is_promised:
                    raise _no_room(shelf, size_bytes)
                elif is_late:
                    raise _no_room_yet(shelf, size_bytes)
                else:
                    moving = None
                    self._changed.wait(_WAIT_S)
            self._end_displacing(moving)
            if is_promised:
                self.uses.stop_stalled(lambda kept: shelf.is_in_the_way(kept, tenant))

    def _allocated(self, shelf: Shelf, tenant: Tenant, spec: TensorSpec) -> DeviceTensor:
        """Return memory of a device, of which calls may have taken what kept tensors left.

        Others make room for it then too, but no more than it takes: they would do so in vain.
        """
        lacking_bytes = spec.nbytes
        while True:
            try:
                return shelf.device_engine.empty(spec)
            except ExhaustedError as error:
                with self._changed:
                    victims = shelf.displaceable(tenant)
                    first = next(victims, None)
                    if first is None or lacking_bytes <= 0:
                        raise UnavailableError(str(error), retry_after_s=RETRY_AFTER_S) from None
                    moving, freed_bytes = self._displace(chain([first], victims), lacking_bytes)
                self._end_displacing(moving)
                lacking_bytes -= freed_bytes

    def _make_room_for_call(self, shelf: Shelf, size_bytes: int, call: Call) -> None:
        """Displace tensors so that a call may take so many bytes more.

        What another tenant has within its share is moved to host memory for it, but not dropped.
        """
        while size_bytes > 0:
            call.check()
            with self._changed:
                tenant = call.tenant
                victims = chain(shelf.displaceable(tenant), self._movable(shelf, tenant))
                first = next(victims, None)
                if first is None:
                    return
                moving, freed_bytes = self._displace(
                    chain([first], victims), size_bytes, for_whom=lambda _: call.tenant
                )
            self._end_displacing(moving)
            size_bytes -= freed_bytes

    def _movable(self, shelf: Shelf, tenant: object) -> Iterator[Kept]:
        """Yield a few tensors that host memory has room for, if it drops what it may for a tenant."""
        below = shelf.below
        if below is not None:
            for kept in shelf.oldest(_TRIED_COUNT):
                if kept.is_idle and below.can_have_room(kept.size_bytes, tenant):
                    yield kept

    # Moves

    def _displace(
        self,
        victims: Iterable[Kept],
        size_bytes: int,
        bytes_of: Callable[[Kept], int] = _ON_DEVICE,
        *,
        for_whom: Callable[[Kept], object] = _ITS_OWN,
    ) -> tuple[Kept | None, int]:
        """Take a step, under the lock, to displace tensors: drop some, or begin to move one.

        Args:
            size_bytes: What is to be freed; it may take more steps than this one.
            bytes_of: Returns what a tensor frees.
            for_whom: Returns the tenant for which host memory may drop something in turn, to take a
                tensor; None for nobody.

        Returns:
            The tensor that is to be moved, for `_end_displacing`, and what the step frees, in bytes.
        """
        freed_bytes = 0
        for kept in islice(victims, _STEP_COUNT):
            fate = self._decide(kept, for_whom(kept))
            if fate is _Fate.UNDECIDED:
                break
            freed_bytes += bytes_of(kept)
            if fate is _Fate.MOVED:
                return kept, freed_bytes
            self.evict(kept)
            if freed_bytes >= size_bytes:
                break
        return None, freed_bytes

    def _decide(self, kept: Kept, tenant: object) -> _Fate:
        """Begin, under the lock, to move a tensor down if it may; let host memory make room for it."""
        below = kept.shelf.below
        if below is None or not kept.is_live or not below.can_have_room(kept.size_bytes, tenant):
            return _Fate.DROPPED
        for lower in islice(below.displaceable(tenant), _STEP_COUNT):
            if below.will_fit(kept.size_bytes):
                break
            self.evict(lower)
        if not below.will_fit(kept.size_bytes):
            return _Fate.UNDECIDED
        below.take(kept.tenant, kept.size_bytes)
        kept.shelf.leaving_bytes += kept.held_bytes
        kept.acquire()
        kept.is_moving = True
        return _Fate.MOVED

    def _end_displacing(self, moving: Kept | None) -> None:
        """Do, outside the lock, what a step has begun."""
        if moving is not None:
            self._move_down(moving)
        self.sweep()

    def _move_down(self, kept: Kept) -> None:
        """Copy a tensor, whose other users rest, to host memory; drop it if that fails."""
        above, below, operand = kept.shelf, self._host, kept.operand
        assert not isinstance(operand, np.ndarray)
        try:
            array = above.device_engine.host_memory(kept.spec)
            above.device_engine.read(operand, Call(), array)
        except Exception as error:  # noqa: BLE001 - whatever it is, the tensor is dropped instead
            _log.warning("a kept tensor is dropped: it cannot be moved to the host", exc_info=error)
            with self._changed:
                above.leaving_bytes -= kept.held_bytes  # from here on as for any that is dropped
                below.leave_unused(kept.tenant, kept.size_bytes)
                below.left(kept.size_bytes)
                self.evict(kept)
                self._moved(kept)
                kept.release()
            return
        grown_bytes = kept.grown_bytes
        with self._changed:
            above.leaving_bytes -= kept.held_bytes  # which it does now
            self._reshelve(kept, below, array)
        free(above, operand, grown_bytes)
        with self._changed:
            above.left(kept.size_bytes + grown_bytes)
            kept.release()
            self._moved(kept)

    def _bring_back(self, kept: Kept, shelf: Shelf, call: Call) -> None:
        """Move a tensor, of which the caller is the only user, to a device if that has room."""
        with self._changed:
            self._host.leaving_bytes += kept.size_bytes  # for what it displaces
        try:
            operand = self._taken(shelf, kept.tenant, kept.spec, call)
            try:
                shelf.device_engine.write(operand, whole_array(kept, call), call)
            except BaseException:
                self._give_up(shelf, kept, operand)
                raise
            self._growth.let_grow(kept, operand, shelf)
            with self._changed:
                self._reshelve(kept, shelf, operand)
                self._host.left(kept.size_bytes)
        except (ExhaustedError, UnavailableError):
            return  # it is as good where it is
        finally:
            with self._changed:
                self._host.leaving_bytes -= kept.size_bytes
                self._moved(kept)

    def _give_up(self, shelf: Shelf, kept: Kept, operand: DeviceTensor) -> None:
        """Free memory that was taken for a tensor which does not come."""
        free(shelf, operand)
        with self._changed:
            shelf.leave_unused(kept.tenant, kept.size_bytes)
            shelf.left(kept.size_bytes)

    def _reshelve(self, kept: Kept, shelf: Shelf, operand: Tensor) -> None:
        """Let a tensor lie elsewhere, under the lock. Its old memory is still to be freed, and to have `left`."""
        kept.shelf.leave(kept)
        self._quotas.give_back(kept.tenant, kept.grown_bytes)
        kept.grown_bytes = 0
        kept.shelf, kept.operand = shelf, operand
        shelf.put(kept)

    def _moved(self, kept: Kept) -> None:
        kept.is_moving = False
        self._changed.notify_all()


def _no_room(shelf: Shelf, size_bytes: int) -> ExhaustedError:
    return ExhaustedError(
        f"{shelf.device_engine.info.id} has {shelf.limit_bytes} bytes for tensors that stay, and beside "
        "what calls use of them and what other tenants have within their share, there is no room "
        f"for {size_bytes} more"
    )


def _no_room_yet(shelf: Shelf, size_bytes: int) -> UnavailableError:
    return UnavailableError(
        f"{shelf.device_engine.info.id} has {shelf.limit_bytes} bytes for tensors that stay, and calls use "
        f"what is to make room for {size_bytes} more: they are within the tenant's share",
        retry_after_s=RETRY_AFTER_S,
    )
