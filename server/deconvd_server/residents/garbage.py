"""Evicted and dropped tensors: collected with the registry's lock held, freed without it."""

from __future__ import annotations

import logging
import threading

import numpy as np

from deconvd_server.device import Tensor
from deconvd_server.residents.entry import MemoryTier, ResidentEntry
from deconvd_server.residents.quotas import Quotas

__all__ = ["Garbage", "free_operand"]

_NOTHING = np.empty(0, np.uint8)

_log = logging.getLogger(__name__)


class Garbage:
    """Tensors whose memory must be freed. Thread-safe.

    Freeing may wait for a device, so it must not happen with the registry's lock held:

        lock held: add (the charge is taken back)  -->  no lock: sweep (memory is freed)  -->  lock held: note_freed

    Args:
        changed: The registry's lock. It is notified when memory has been freed.
        quotas: The tenants' quotas, guarded by the lock.
    """

    def __init__(self, changed: threading.Condition, quotas: Quotas) -> None:
        self._changed = changed
        self._quotas = quotas
        self._tensors: list[ResidentEntry] = []

    def add(self, entry: ResidentEntry) -> None:
        """Take a tensor that is FREED. The caller holds the lock."""
        entry.tier.remove(entry)
        self._quotas.give_back(entry.tenant, entry.size_bytes)
        self._tensors.append(entry)

    def sweep(self) -> None:
        """Free all collected tensors. The caller must not hold the lock."""
        with self._changed:
            tensors, self._tensors = self._tensors, []
        if not tensors:
            return
        for entry in tensors:
            free_operand(entry.tier, entry.operand)
            entry.operand = _NOTHING  # a resting call may refer to the entry for long
        with self._changed:
            for entry in tensors:
                entry.tier.note_freed(entry.size_bytes)
            self._changed.notify_all()


def free_operand(tier: MemoryTier, operand: Tensor) -> None:
    """Free the elements of a tensor. Does not raise."""
    if isinstance(operand, np.ndarray):
        return  # host memory is freed with the last reference
    try:
        tier.device_engine.free(operand)
    except Exception:  # noqa: BLE001 - logged: nobody is left to tell
        _log.exception("freeing the device memory of a resident tensor failed")
