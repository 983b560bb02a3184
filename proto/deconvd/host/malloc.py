"""Settings of glibc's malloc: it keeps the memory of freed messages for the next ones.

By default it returns each large freed block to the kernel at once, and the kernel zeroes the pages of the next one.
That takes a tenth of a client's time in a large call, and a third of the kernel's time on a server. Other C libraries
are not changed.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from pathlib import Path
from typing import Any, Final

import numpy as np

__all__ = ["LARGE_BYTES", "allocated_bytes", "keep_freed_memory", "raise_mmap_threshold"]

LARGE_BYTES: Final = 32 << 20
"""glibc never keeps freed blocks of this size or larger (DEFAULT_MMAP_THRESHOLD_MAX)."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # parameters of mallopt(3)
_KEPT_BYTES: Final = 256 << 20
_ARENAS_COUNT: Final = 2

_log = logging.getLogger(__name__)


class _MallInfo2(ctypes.Structure):
    """struct mallinfo2 of the C library."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


_mallinfo2: Any = getattr(ctypes.CDLL(None), "mallinfo2", None)
if _mallinfo2 is not None:
    _mallinfo2.restype = _MallInfo2


def allocated_bytes() -> int:
    """Return how many bytes the process has allocated and not freed.

    With another C library than glibc: how many bytes of its own it has in memory.
    """
    if _mallinfo2 is None:
        resident_pages, shared_pages = Path("/proc/self/statm").read_text().split()[1:3]
        return (int(resident_pages) - int(shared_pages)) * mmap.PAGESIZE
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


def keep_freed_memory(kept_bytes: int = _KEPT_BYTES) -> None:
    """Make a server process keep up to `kept_bytes` of freed memory.

    By default glibc keeps freed memory in separate arenas, up to eight for each processor. With many threads the
    memory then grows for ten thousand calls before it is stable. A few arenas cost no time, since only one thread at
    a time has the interpreter's lock and can allocate.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        _log.debug("the C library has no mallopt: freed memory returns to the system at once")
        return
    mallopt(
        _M_MMAP_THRESHOLD, min(kept_bytes // 8, LARGE_BYTES)
    )  # larger blocks would also leave holes, which cannot be trimmed
    mallopt(_M_TRIM_THRESHOLD, kept_bytes)
    mallopt(_M_ARENA_MAX, _ARENAS_COUNT)


def raise_mmap_threshold() -> None:
    """Make a process that belongs to the user keep freed blocks, without overriding the user's own `mallopt`.

    glibc raises its threshold to the largest block that the program has freed. So free a large block once. It costs
    nothing, because its pages are never touched.
    """
    np.empty(LARGE_BYTES - (1 << 20), np.uint8)
