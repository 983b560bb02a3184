"""How the process's memory allocator is set: for buffers of a megabyte that come and go all the time."""

from __future__ import annotations

import ctypes
import logging

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT_BYTES = 256 << 20
_LARGE_BYTES = 32 << 20

_log = logging.getLogger(__name__)


def keep_freed_memory() -> None:
    """Let glibc keep some freed memory for the next message.

    By default it returns a freed megabyte to the kernel at once, which zeroes it for the next
    message: a third of the time that the kernel spends on a large call. Another C library is left
    as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        _log.debug("this C library has no mallopt")
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
