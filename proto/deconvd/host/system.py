"""Differences between operating systems. The client runs on any system, the server on Linux only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["MAX_TIMEOUT_S", "MAX_UNIX_PATH_BYTES", "is_valid_unix_path", "processors_count"]

MAX_TIMEOUT_S: Final = 1e6
"""The longest timeout, eleven days. The timers of systems end at 2**31 ms, so longer timeouts are cut to this."""

MAX_UNIX_PATH_BYTES: Final = 107
"""Size of sun_path in sockaddr_un(7), without the final zero byte."""


def is_valid_unix_path(path: str | Path) -> bool:
    """Return whether a Unix socket can have a path: it is short enough, and has no null byte."""
    data = os.fsencode(path)
    return len(data) <= MAX_UNIX_PATH_BYTES and b"\0" not in data


def processors_count() -> int:
    """Return how many processors this process may use. If the system cannot tell, return how many it has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
