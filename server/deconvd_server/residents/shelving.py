"""Where kept tensors lie: on devices, or in host memory when there is no room there; and what makes room for what."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice

import numpy as np

from deconvd.cache_state import CacheState
from deconvd.copying import copy_into
from deconvd.errors import ExhaustedError, UnavailableError
from deconvd.problem import TensorSpec
from deconvd.tensor import Array
from deconvd_server.call import Call
from deconvd_server.device import DeviceTensor, Tensor
from deconvd_server.engine import Engine
from deconvd_server.residents.kept import Kept, Quotas, Shelf, counted_bytes
from deconvd_server.residents.tenant import Tenant

__all__ = ["Shelving"]

_WAIT_S = 0.05
"""How often one who waits for memory that is being freed looks whether its call is still wanted."""

_RETRY_AFTER_S = 0.5

_TRIED_COUNT = 16
"""Tensors of which host memory is asked whether it has room: where it has none for these, it is full."""

_log = logging.getLogger(__name__)


class Shelving:
    """Shelves for kept tensors, one for each device and one in host memory. Thread-safe.

    It decides under a lock, and moves and frees outside it. A tensor that someone uses stays where
    it is. Room is made by what was used least recently of what nobody uses; see
    `Shelf.displaceable`.

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
        self._garbage: list[Kept] = []
        self._shelves: dict[str, Shelf] = {}
        for engine in engines:
            below = self._host if engine.info.has_own_memory else None
            shelf = self._shelves[engine.info.id] = Shelf(limit_bytes(engine), engine, below)
            engine.on_shortage = partial(self._make_room_for_call, shelf)

    def make(self, tenant: Tenant, spec: TensorSpec, engine: Engine, call: Call) -> Kept:
        """Return a new tensor on an engine's device, with any elements. The caller is its user.

        Raises:
            ExhaustedError: What may be kept there is kept already, and cannot be displaced.
            UnavailableError: Calls take the memory now.
        """
        shelf = self._shelves[engine.info.id]
        operand = self._taken(shelf, tenant, spec, call)
        kept = Kept(tenant, spec, shelf, operand, self._discard)
        operand.may_grow = partial(self._may_grow, kept)
        with self._changed:
            kept.life.acquire()
            shelf.put(kept)
        return kept

    def operand(self, kept: Kept, engine: Engine, call: Call) -> Tensor:
        """Return the elements of a tensor that the caller uses, as an operand for an engine.

        What lies on another device is copied through the host. What lies in host memory is brought
        back if there is room for it, and used from there if not.
        """
        shelf = self._shelves[engine.info.id]
        with self._changed:
            if kept.shelf is shelf:
                shelf.hits_count += 1
                return kept.operand
            shelf.misses_count += 1
            is_brought = kept.shelf.engine is None and kept.life.users_count == 1
            kept.is_moving = is_brought
        if is_brought:
            self._bring_back(kept, shelf, call)
        return kept.operand if kept.shelf is shelf else self.array(kept, call)

    def array(self, kept: Kept, call: Call, out: Array | None = None) -> Array:
        """Return the elements of a tensor that the caller uses: in `out`, if given, an array of its form."""
        if not isinstance(kept.operand, np.ndarray):
            return _engine(kept.shelf).read(kept.operand, call, out)
        if out is None:
            return kept.operand
        copy_into(out, kept.operand)
        return out

    def evict(self, kept: Kept) -> None:
        """Drop a tensor, under the lock: at once if nobody uses it. `sweep` frees it."""
        self._forget(kept)
        kept.life.retire()

    def sweep(self) -> None:
        """Free, outside the lock, what was dropped under it."""
        with self._changed:
            garbage, self._garbage = self._garbage, []
        for kept in garbage:
            self._free(kept.shelf, kept.operand, kept.grown_bytes)
            with self._changed:
                kept.shelf.left(kept.held_bytes)
                self._changed.notify_all()

    def states(self, engine: Engine) -> list[CacheState]:
        """Return what lies on an engine's device now, and beneath it."""
        shelf = self._shelves[engine.info.id]
        with self._changed:
            states = [shelf.state("resident tensors")]
            if shelf.below is not None:
                states.append(shelf.below.state("resident tensors in host memory"))
        return states

    def _discard(self, kept: Kept) -> None:
        """Take, under the lock, a tensor that was dropped and that nobody uses any more."""
        kept.shelf.leave(kept)
        self._quotas.give_back(kept.tenant, kept.held_bytes)
        self._garbage.append(kept)

    def _free(self, shelf: Shelf, operand: Tensor, grown_bytes: int = 0) -> None:
        if isinstance(operand, np.ndarray):
            return  # the memory goes with the last reference
        try:
            _engine(shelf).free(operand)
            _engine(shelf).release(grown_bytes)
        except Exception:
            _log.exception("the memory of a kept tensor could not be freed in good order")

    # Room

    def _taken(self, shelf: Shelf, tenant: Tenant, spec: TensorSpec, call: Call) -> DeviceTensor:
        """Return memory of a device that was counted as taken."""
        size_bytes = counted_bytes(spec)
        self._take_room(shelf, tenant, size_bytes, call)
        try:
            return self._allocated(shelf, tenant, spec)
        except BaseException:
            with self._changed:
                shelf.leave_unused(tenant, size_bytes)
                shelf.left(size_bytes)
            raise

    def _take_room(self, shelf: Shelf, tenant: Tenant, size_bytes: int, call: Call) -> None:
        while True:
            call.check()
            with self._changed:
                if shelf.fits(size_bytes):
                    shelf.take(tenant, size_bytes)
                    return
                if shelf.will_fit(size_bytes):
                    self._changed.wait(_WAIT_S)
                    continue
                if not shelf.can_have_room(size_bytes, tenant):
                    raise _no_room(shelf, size_bytes)
                victim = next(shelf.displaceable(tenant))
                self._begin_displacing(victim, victim.tenant)
            self._end_displacing(victim)

    def _allocated(self, shelf: Shelf, tenant: Tenant, spec: TensorSpec) -> DeviceTensor:
        """Return memory of a device, of which calls may have taken what kept tensors left.

        Others make room for it then too, but no more than it takes: they would do so in vain.
        """
        displaced_bytes = 0
        while True:
            try:
                return _engine(shelf).empty(spec)
            except ExhaustedError as error:
                with self._changed:
                    victim = next(shelf.displaceable(tenant), None)
                    if victim is None or displaced_bytes >= spec.nbytes:
                        raise UnavailableError(str(error), retry_after_s=_RETRY_AFTER_S) from None
                    displaced_bytes += victim.held_bytes
                    self._begin_displacing(victim, victim.tenant)
                self._end_displacing(victim)

    def _make_room_for_call(self, shelf: Shelf, size_bytes: int, call: Call) -> None:
        """Displace tensors so that a call may take so many bytes more.

        What another tenant has within its share is moved to host memory for it, but not dropped.
        """
        while size_bytes > 0:
            with self._changed:
                oldest = islice(shelf.idle(), _TRIED_COUNT)
                movable = (kept for kept in oldest if self._can_move_down(kept, call.tenant))
                victim = next(chain(shelf.displaceable(call.tenant), movable), None)
                if victim is None:
                    return
                grown_bytes = victim.grown_bytes
                self._begin_displacing(victim, call.tenant)
            self._end_displacing(victim)
            size_bytes -= victim.spec.nbytes + grown_bytes

    def _may_grow(self, kept: Kept, size_bytes: int) -> bool:
        """Count so many bytes more with a tensor, if there is room for them as it is.

        The device asks in the midst of a call that uses the tensor: it stays where it is meanwhile.
        """
        engine, tenant = _engine(kept.shelf), kept.tenant
        if size_bytes > 0:
            try:
                engine.hold(size_bytes)
            except ExhaustedError:
                return False
        else:
            engine.release(-size_bytes)
        with self._changed:
            has_room = kept.shelf.fits(size_bytes) and self._quotas.have_room(tenant, size_bytes)
            if size_bytes <= 0 or has_room:
                kept.shelf.take(tenant, size_bytes)
                self._quotas.take(tenant, size_bytes)
                kept.grown_bytes += size_bytes
                return True
        engine.release(size_bytes)
        return False

    # Moves

    def _can_move_down(self, kept: Kept, tenant: object) -> bool:
        below = kept.shelf.below
        return below is not None and below.can_have_room(kept.size_bytes, tenant)

    def _begin_displacing(self, kept: Kept, tenant: object) -> None:
        """Begin, under the lock, to take an idle tensor from its device: move it down or else drop it.

        Args:
            tenant: For whom host memory may drop something in turn; None for nobody.
        """
        below = kept.shelf.below
        while below is not None and not below.will_fit(kept.size_bytes):
            lower = next(below.displaceable(tenant), None)
            if lower is None or not below.can_have_room(kept.size_bytes, tenant):
                below = None
            else:
                self.evict(lower)
        if below is None:
            self.evict(kept)
            return
        below.take(kept.tenant, kept.size_bytes)
        kept.shelf.leaving_bytes += kept.held_bytes
        kept.life.acquire()
        kept.is_moving = True

    def _end_displacing(self, kept: Kept) -> None:
        """Do, outside the lock, what was begun."""
        if kept.is_moving:
            self._move_down(kept)
        self.sweep()

    def _move_down(self, kept: Kept) -> None:
        """Copy a tensor, of which the caller is the only user, to host memory; drop it if that fails."""
        above, below, operand = kept.shelf, self._host, kept.operand
        assert not isinstance(operand, np.ndarray)
        try:
            array = _engine(above).host_memory(kept.spec)
            _engine(above).read(operand, Call(), array)
        except Exception as error:
            _log.warning("a kept tensor is dropped: it cannot be moved to the host", exc_info=error)
            with self._changed:
                above.leaving_bytes -= kept.held_bytes  # from here on as for any that is dropped
                below.leave_unused(kept.tenant, kept.size_bytes)
                below.left(kept.size_bytes)
                self.evict(kept)
                self._moved(kept)
                kept.life.release()
            return
        grown_bytes = kept.grown_bytes
        with self._changed:
            above.leaving_bytes -= kept.held_bytes  # which it does now
            self._reshelve(kept, below, array)
        self._free(above, operand, grown_bytes)
        with self._changed:
            above.left(kept.size_bytes + grown_bytes)
            kept.life.release()
            self._moved(kept)

    def _bring_back(self, kept: Kept, shelf: Shelf, call: Call) -> None:
        """Move a tensor, of which the caller is the only user, to a device if that has room."""
        with self._changed:
            self._host.leaving_bytes += kept.size_bytes  # for what it displaces
        try:
            operand = self._taken(shelf, kept.tenant, kept.spec, call)
            try:
                _engine(shelf).write(operand, self.array(kept, call), call)
            except BaseException:
                self._give_up(shelf, kept, operand)
                raise
            operand.may_grow = partial(self._may_grow, kept)
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
        self._free(shelf, operand)
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


def _engine(shelf: Shelf) -> Engine:
    if shelf.engine is None:
        raise RuntimeError("host memory is no engine's")
    return shelf.engine


def _no_room(shelf: Shelf, size_bytes: int) -> ExhaustedError:
    return ExhaustedError(
        f"{_engine(shelf).info.id} has {shelf.limit_bytes} bytes for tensors that stay, and beside "
        "what calls use of them and what other tenants have within their share, there is no room "
        f"for {size_bytes} more"
    )
