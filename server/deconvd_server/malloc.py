"""How the process's memory allocator is set: for buffers of a megabyte that come and go in many threads."""

from __future__ import annotations

import ctypes
import logging

__all__ = ["LARGE_BYTES", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_KEPT_BYTES = 256 << 20
_ARENAS_COUNT = 2

LARGE_BYTES = 32 << 20
"""From this size on glibc can keep nothing."""

_log = logging.getLogger(__name__)


def keep_freed_memory() -> None:
    """Let glibc keep some freed memory for the next message.

    By default it returns a freed megabyte to the kernel at once, which zeroes it for the next
    message: a third of the time that the kernel spends on a large call. What threads free it keeps
    apart for each of them, up to eight times as many as there are processors: memory then grows for
    ten thousand calls before it stays. Few such arenas cost no time, since the interpreter's lock
    lets one thread at a time ask for memory anyway. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        _log.debug("this C library has no mallopt")
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_ARENA_MAX, _ARENAS_COUNT)
