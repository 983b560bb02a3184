"""Decides to which worker a client keeps. Pure, but for chance between equals."""

from __future__ import annotations

import random
from collections.abc import Mapping

__all__ = ["better_home", "by_companions", "companions"]


def companions(active: Mapping[str, int], own: Mapping[str, int]) -> dict[str, int]:
    """Return how many active connections of other clients each worker has.

    Args:
        active: The active connections of all clients, by the names of the workers.
        own: Those of this client. Some may be idle, and then they are not among the active ones.
    """
    return {name: max(count - own.get(name, 0), 0) for name, count in active.items()}


def by_companions(others: Mapping[str, int]) -> list[str]:
    """Return the names of the workers, those with the fewest companions first, equal ones in any order."""
    return sorted(others, key=lambda name: (others[name], random.random()))  # noqa: S311 - no secret


def better_home(home: str, others: Mapping[str, int]) -> str | None:
    """Return the worker where a client has fewer companions than at its home; None if there is none.

    To move must make the client better off itself: so moves come to an end, with all workers within one client of each
    other, as long as no two clients move at the same moment.
    """
    first = by_companions(others)[0]
    return first if others[first] < others[home] else None
