"""Starts NVIDIA's driver and cards in the background, while the modules are imported that use them. Needs no CuPy."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

__all__ = ["start_cards"]


def start_cards(ordinals: Sequence[int] | None) -> None:
    """Start cards in a thread: it takes 0.2 to 0.6 s, without the interpreter's lock.

    An error is left to whoever opens the card, and meets it too. An interpreter that exits waits for the thread: a
    driver must not be left amid its start.

    Args:
        ordinals: The numbers of the cards; None for all.
    """
    threading.Thread(target=_start, args=(ordinals,), name="start-cards").start()


def _start(ordinals: Sequence[int] | None) -> None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    count, device, context = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return
    for ordinal in range(count.value) if ordinals is None else ordinals:
        if not driver.cuDeviceGet(ctypes.byref(device), ordinal):
            # CUDA's runtime uses this context too, for as long as the process lives
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
