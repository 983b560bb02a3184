"""A stand-in: a plan of ours that serves calls at once, until a search has found the plan that takes its place.

Asking cuDNN for a plan takes 5 to 15 ms, and whoever never sends a shape twice would pay that with each call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from deconvd_server.device.cuda.plan import Plan

__all__ = ["RESTORE_MS", "SEARCH_MS", "StandIn"]

SEARCH_MS: Final = 10.0
"""About what a search takes that asks cuDNN, in milliseconds."""

RESTORE_MS: Final = 2.0
"""About what it takes to make a plan of cuDNN that was chosen before, in milliseconds."""


class StandIn:
    """A plan that is the best that could be had at once. See `Plan`. Thread-safe.

    Args:
        plan: What it executes.
        calls_count: After that many calls, a search is worth what it takes.
        ask_for_search: Called then, with the stand-in, and again after as many calls while it is not replaced. Must not
            wait.

    Attributes:
        is_replaced: Whether a better plan has taken its place. Whoever sees it set should ask for that plan.
    """

    def __init__(
        self, plan: Plan, calls_count: int, ask_for_search: Callable[[StandIn], None]
    ) -> None:
        self.name = plan.name
        self.deterministic = plan.deterministic
        self.workspace_bytes = plan.workspace_bytes
        self.execute = plan.execute
        self.is_replaced = False
        self._calls_count = calls_count
        self._ask_for_search = ask_for_search
        self._lock = threading.Lock()
        self._served_count = 0

    def note_call(self) -> None:
        """Count a call that it is about to serve."""
        with self._lock:
            self._served_count += 1
            is_due = self._served_count % self._calls_count == 0
        if is_due:
            self._ask_for_search(self)
