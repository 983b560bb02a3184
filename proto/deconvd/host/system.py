"""What not every operating system has: a client runs on any of them, a server on Linux."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

__all__ = ["MAX_TIMEOUT_S", "MAX_UNIX_PATH_BYTES", "is_valid_unix_path", "processors_count"]

MAX_TIMEOUT_S: Final = 1e6
"""Eleven days. Systems' timers do not reach much further (2**31 ms), so what is longer is taken for this."""

MAX_UNIX_PATH_BYTES: Final = 107
"""sun_path of sockaddr_un(7), less the final zero."""


def is_valid_unix_path(path: str | Path) -> bool:
    """Return whether a Unix socket may have a path."""
    return len(os.fsencode(path)) <= MAX_UNIX_PATH_BYTES


def processors_count() -> int:
    """Return how many processors this process may use: where it cannot know, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
