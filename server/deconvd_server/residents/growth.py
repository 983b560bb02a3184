"""What devices keep with tensors beside their elements: asked for by them, and counted here."""

from __future__ import annotations

import threading
from functools import partial

from deconvd.errors import ExhaustedError
from deconvd_server.device import DeviceTensor
from deconvd_server.residents.entry import MemoryTier, ResidentEntry
from deconvd_server.residents.quotas import Quotas

__all__ = ["Growth"]


class Growth:
    """Lets tensors grow where there is room.

    Args:
        changed: The lock.
        quotas: Of tenants, guarded by the lock.
    """

    def __init__(self, changed: threading.Condition, quotas: Quotas) -> None:
        self._changed = changed
        self._quotas = quotas

    def allow_growth(self, kept: ResidentEntry, operand: DeviceTensor, shelf: MemoryTier) -> None:
        """Let a device that makes copies of tensors ask whether it may keep more with one."""
        if shelf.device_engine.info.has_own_memory:
            operand.may_grow = partial(self._try_grow, kept)

    def _try_grow(self, kept: ResidentEntry, size_bytes: int) -> bool:
        """Count so many bytes more with a tensor, if there is room for them as it is.

        The device asks in the midst of a call that uses the tensor: it stays where it is meanwhile.
        """
        engine, tenant = kept.tier.device_engine, kept.tenant
        if size_bytes > 0:
            try:
                engine.reserve(size_bytes)
            except ExhaustedError:
                return False
        else:
            engine.release(-size_bytes)
        with self._changed:
            has_room = kept.tier.fits(size_bytes) and self._quotas.have_room(tenant, size_bytes)
            if size_bytes <= 0 or has_room:
                kept.tier.reserve(tenant, size_bytes)
                self._quotas.take(tenant, size_bytes)
                kept.grown_bytes += size_bytes
                return True
        engine.release(size_bytes)
        return False
