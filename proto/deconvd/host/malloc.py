"""How glibc's allocator learns to keep memory for messages: megabytes that come and go.

By default it returns each freed megabyte to the kernel at once, which zeroes it for the next message: a tenth of a
client's time for a large call, and a third of the kernel's for a server. Another C library is left as it is.
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
"""From this size on glibc can keep nothing."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT_BYTES: Final = 256 << 20
_ARENAS_COUNT: Final = 2

_log = logging.getLogger(__name__)


class _MallInfo2(ctypes.Structure):
    """The C library's struct mallinfo2."""

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
    """Return what the process has allocated and not freed; with another C library than glibc, what it has in memory."""
    if _mallinfo2 is None:
        resident_pages, shared_pages = Path("/proc/self/statm").read_text().split()[1:3]
        return (int(resident_pages) - int(shared_pages)) * mmap.PAGESIZE
    info = _mallinfo2()
    return int(info.uordblks + info.hblkhd)


def keep_freed_memory(kept_bytes: int = _KEPT_BYTES) -> None:
    """Set it for a process that is a server, with many threads, to keep no more than `kept_bytes`.

    What threads free it keeps apart for each of them, up to eight times as many as there are processors: memory
    then grows for ten thousand calls before it stays. Few such arenas cost no time, since the interpreter's lock
    lets one thread at a time ask for memory anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        _log.debug("this C library has no mallopt")
        return
    mallopt(
        _M_MMAP_THRESHOLD, min(kept_bytes // 8, LARGE_BYTES)
    )  # beyond it, holes would be kept as well
    mallopt(_M_TRIM_THRESHOLD, kept_bytes)
    mallopt(_M_ARENA_MAX, _ARENAS_COUNT)


def raise_mmap_threshold() -> None:
    """Let it learn in a process that is another's. One that was told otherwise (`mallopt`) stays so.

    It keeps blocks up to the largest that a program has freed. So free a large one, which was never
    touched and costs nothing.
    """
    np.empty(LARGE_BYTES - (1 << 20), np.uint8)
