"""Where nobody has answered, and for how long to leave that place alone."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final, TypeAlias

__all__ = ["Place", "VainTries"]

Place: TypeAlias = tuple[str, str]
"""A target, and the id of the instance that should be there."""

_PAUSE_FACTOR: Final = 5.0
"""How many times longer than a try has taken its place is left alone, at least. Each further try doubles the pause."""

_MAX_PAUSE_S: Final = 600.0


class VainTries:
    """The places where nobody has answered. Thread-safe: each change is one atomic step of the interpreter.

    What is refused at once costs nothing, and may be there in a moment: it is tried again soon. Packets that vanish, as
    in a firewall, cost a try its whole time: so it is some seconds, and then minutes, until the next one.
    """

    def __init__(self) -> None:
        self._pauses: dict[Place, tuple[float, float]] = {}  # when each ends, and how long it is

    def note(self, place: Place, took_s: float) -> None:
        """Note that a try was vain that took so long."""
        _, last_s = self._pauses.get(place, (0.0, 0.0))
        pause_s = min(max(2 * last_s, _PAUSE_FACTOR * took_s), _MAX_PAUSE_S)
        self._pauses[place] = time.monotonic() + pause_s, pause_s

    def remaining_s(self, place: Place) -> float:
        """Return for how many seconds a place should be left alone; 0 if it may be tried."""
        end_s, _ = self._pauses.get(place, (0.0, 0.0))
        return max(end_s - time.monotonic(), 0.0)

    def keep(self, places: Collection[Place]) -> None:
        """Forget all other places: there is nobody whom to try there."""
        for place in [*self._pauses]:
            if place not in places:
                self._pauses.pop(place, None)

    def forget(self, place: Place) -> None:
        """Forget a place: somebody has answered there."""
        self._pauses.pop(place, None)
