"""What was dropped under the lock, and is freed outside it."""

from __future__ import annotations

import logging
import threading

import numpy as np

from deconvd_server.device import Tensor
from deconvd_server.device.tensor import refuse_growth
from deconvd_server.residents.entry import MemoryTier, ResidentEntry
from deconvd_server.residents.quotas import Quotas

__all__ = ["Garbage", "free_operand"]

_NOTHING = np.empty(0, np.uint8)

_log = logging.getLogger(__name__)


class Garbage:
    """Tensors that are to be freed.

    Args:
        changed: The lock; what is freed is notified.
        quotas: Of tenants, guarded by the lock.
    """

    def __init__(self, changed: threading.Condition, quotas: Quotas) -> None:
        self._changed = changed
        self._quotas = quotas
        self._tensors: list[ResidentEntry] = []

    def add(self, kept: ResidentEntry) -> None:
        """Take, under the lock, a tensor that was dropped and that nobody uses any more."""
        kept.tier.remove(kept)
        self._quotas.give_back(kept.tenant, kept.charged_bytes)
        self._tensors.append(kept)

    def sweep(self) -> None:
        """Free, outside the lock, what there is."""
        with self._changed:
            tensors, self._tensors = self._tensors, []
        if not tensors:
            return
        for kept in tensors:
            free_operand(kept.tier, kept.operand, kept.grown_bytes)
            kept.operand = _NOTHING  # a call that rests with it may refer to it for long
        with self._changed:
            for kept in tensors:
                kept.tier.note_freed(kept.charged_bytes)
            self._changed.notify_all()


def free_operand(shelf: MemoryTier, operand: Tensor, grown_bytes: int = 0) -> None:
    """Free the memory of a tensor that lay on a shelf, and what its device kept with it. Does not raise."""
    if isinstance(operand, np.ndarray):
        return  # the memory goes with the last reference
    operand.may_grow = refuse_growth  # it refers to the tensor, which refers to it
    try:
        shelf.device_engine.free(operand)
        shelf.device_engine.release(grown_bytes)
    except Exception:  # noqa: BLE001 - logged: nobody is left to tell
        _log.exception("the memory of a kept tensor could not be freed in good order")
