"""What is admitted, and what waits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Load"]


@dataclass(frozen=True, slots=True)
class Load:
    """How many calls run and wait, how many bytes running calls use, and how many are reserved.

    Attributes:
        wait_s: How long a further call would wait for a place, as estimated from how fast places become free.
        refused_counts: How many calls were refused so far, by reason: see `RefusalReason`.
    """

    running_count: int
    waiting_count: int
    used_bytes: int
    reserved_bytes: int = 0
    wait_s: float = field(default=0.0, compare=False)
    refused_counts: Mapping[str, int] = field(default_factory=dict, compare=False)
