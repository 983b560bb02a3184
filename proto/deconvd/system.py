"""What not every operating system has: a client runs on any of them, a server on Linux."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

__all__ = ["LONGEST_S", "call_in_forked_children", "processors_count"]

LONGEST_S: Final = 1e6
"""Eleven days. Systems' timers do not reach much further (2**31 ms), so what is longer is taken for this."""


def call_in_forked_children(callback: Callable[[], None]) -> None:
    """Have a function called in each child that is forked from now on, where processes can fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=callback)


def processors_count() -> int:
    """Return how many processors this process may use: where it cannot know, how many there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
