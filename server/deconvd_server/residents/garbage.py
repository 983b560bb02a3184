"""What was dropped under the lock, and is freed outside it."""

from __future__ import annotations

import logging
import threading

import numpy as np

from deconvd_server.device import Tensor
from deconvd_server.device.tensor import never
from deconvd_server.residents.counting import Quotas
from deconvd_server.residents.kept import Kept, Shelf

__all__ = ["Garbage", "free"]

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
        self._tensors: list[Kept] = []

    def add(self, kept: Kept) -> None:
        """Take, under the lock, a tensor that was dropped and that nobody uses any more."""
        kept.shelf.leave(kept)
        self._quotas.give_back(kept.tenant, kept.held_bytes)
        self._tensors.append(kept)

    def sweep(self) -> None:
        """Free, outside the lock, what there is."""
        with self._changed:
            tensors, self._tensors = self._tensors, []
        if not tensors:
            return
        for kept in tensors:
            free(kept.shelf, kept.operand, kept.grown_bytes)
            kept.operand = _NOTHING  # a call that rests with it may refer to it for long
        with self._changed:
            for kept in tensors:
                kept.shelf.left(kept.held_bytes)
            self._changed.notify_all()


def free(shelf: Shelf, operand: Tensor, grown_bytes: int = 0) -> None:
    """Free the memory of a tensor that lay on a shelf, and what its device kept with it. Does not raise."""
    if isinstance(operand, np.ndarray):
        return  # the memory goes with the last reference
    operand.may_grow = never  # it refers to the tensor, which refers to it
    try:
        shelf.device_engine.free(operand)
        shelf.device_engine.release(grown_bytes)
    except Exception:  # noqa: BLE001 - logged: nobody is left to tell
        _log.exception("the memory of a kept tensor could not be freed in good order")
