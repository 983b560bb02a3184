"""Which host measures."""

from __future__ import annotations

import os
import platform

__all__ = ["host"]


def host() -> str:
    """Return the kind of the host's processors, and how many of them this process may use."""
    return f"{platform.machine()}, {len(os.sched_getaffinity(0))} processors"
