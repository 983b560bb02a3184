"""Memory that a device keeps with a resident tensor in addition to its elements, such as prepacked forms of W."""

from __future__ import annotations

import threading
from functools import partial

from deconvd.errors import ExhaustedError
from deconvd_server.device import DeviceTensor
from deconvd_server.residents.entry import MemoryTier, ResidentEntry
from deconvd_server.residents.quotas import Quotas

__all__ = ["Growth"]


class Growth:
    """Decides whether a resident tensor may grow, and charges its tier and its tenant for it. Thread-safe.

    Args:
        changed: The registry's lock.
        quotas: The tenants' quotas, guarded by the lock.
    """

    def __init__(self, changed: threading.Condition, quotas: Quotas) -> None:
        self._changed = changed
        self._quotas = quotas

    def allow_growth(self, entry: ResidentEntry, operand: DeviceTensor, tier: MemoryTier) -> None:
        """Let the device of a tensor ask for memory to keep with it, if that device has memory of its own."""
        if tier.device_engine.info.has_own_memory:
            operand.may_grow = partial(self._try_grow, entry)

    def _try_grow(self, entry: ResidentEntry, size_bytes: int) -> bool:
        """Charge that many more bytes to a tensor, or fewer if negative; return False if there is no room for them.

        The device asks while a call uses the tensor, so the tensor is not moved meanwhile. Nothing is evicted for it.
        The engine's budget and the registry's lock are taken one after the other, never together.
        """
        engine, tenant = entry.tier.device_engine, entry.tenant
        if size_bytes > 0:
            try:
                engine.reserve(size_bytes)
            except ExhaustedError:
                return False
        else:
            engine.release(-size_bytes)
        with self._changed:
            has_room = entry.tier.fits(size_bytes) and self._quotas.have_room(tenant, size_bytes)
            if size_bytes <= 0 or has_room:
                entry.tier.reserve(tenant, size_bytes)
                self._quotas.take(tenant, size_bytes)
                entry.grown_bytes += size_bytes
                return True
        engine.release(size_bytes)
        return False
