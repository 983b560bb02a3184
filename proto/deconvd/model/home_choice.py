"""Which worker of a host a client should keep to: decided alike by a server that names one and a client that moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

__all__ = ["better_home", "rank_homes"]


def rank_homes(loads: Mapping[str, int], devices: Mapping[str, str]) -> list[str]:
    """Return the names of the workers, the best home first, equal ones in the order of `loads`.

    The least loaded device comes first, and on it the least loaded worker.

    Args:
        loads: What others have at each worker, by its name.
        devices: The device of each worker. Several may have the same one.
    """
    return sorted(loads, key=_crowding(loads, devices).__getitem__)


def better_home(home: str, loads: Mapping[str, int], devices: Mapping[str, str]) -> str | None:
    """Return the worker where a client would be better off than at its home; None if there is none.

    To move must make the client better off itself: so moves come to an end, with all devices within one client of each
    other, and so the workers of each, as long as no two clients move at the same moment.

    Args:
        home: The name of its worker.
        loads: As for `rank_homes`, without what the client itself has there.
        devices: As for `rank_homes`.
    """
    crowding = _crowding(loads, devices)
    first = min(crowding, key=crowding.__getitem__)
    return first if crowding[first] < crowding[home] else None


def _crowding(loads: Mapping[str, int], devices: Mapping[str, str]) -> dict[str, tuple[int, int]]:
    """Return what there is on each worker's device in all, and on the worker itself."""
    of_devices: Counter[str] = Counter()
    for name, load in loads.items():
        of_devices[devices[name]] += load
    return {name: (of_devices[devices[name]], load) for name, load in loads.items()}
