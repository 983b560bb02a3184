"""Which work is captured as a graph, and which graphs are kept: decided here, done elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

__all__ = ["GraphCache"]

_T = TypeVar("_T")

_WARM_RUNS: Final = 1
"""Runs of some work before it is captured: what comes once is not worth it."""

_MAX_GRAPHS_COUNT: Final = 32
"""Graphs that are kept: calls take turns with a few blocks of the card, and some have a graph for each part.

One of a whole call takes 0.3 MB of the card and as much of the host, one of a part 0.1 and 0.05 (seen on an H100).
"""

_UNUSED_RUNS: Final = 32 * _MAX_GRAPHS_COUNT
"""Runs after which what has not come again makes room."""


class GraphCache(Generic[_T]):
    """Work that differs only in the places that it is bound to, each captured once it comes again.

    Where there are more places than graphs can be kept for, some have graphs and the others none: to
    capture a graph costs as much as many runs without one, so none gives way to what may not come
    again either.
    """

    def __init__(self) -> None:
        self._runs_count = 0
        self._entries: OrderedDict[Hashable, _GraphEntry[_T]] = OrderedDict()

    def run(
        self,
        at: Hashable,
        work: Callable[[], None],
        capture: Callable[[], _T | None],
        replay: Callable[[_T], bool],
    ) -> None:
        """Do some work.

        Args:
            at: The places that it is bound to.
            work: Does it.
            capture: Returns it as a graph, without doing it; None if no graph can hold it.
            replay: Does it by its graph; returns False if it cannot.
        """
        self._runs_count += 1
        place = self._find_entry(at)
        if place is None:
            work()
            return
        place.last_run = self._runs_count
        place.runs_count += 1
        if place.runs_count == _WARM_RUNS + 1:
            place.graph = capture()
        if place.graph is None or not replay(place.graph):
            work()

    def _find_entry(self, at: Hashable) -> _GraphEntry[_T] | None:
        """Return what is known of some places; None if there is no room to know anything."""
        place = self._entries.get(at)
        if place is None:
            if len(self._entries) >= _MAX_GRAPHS_COUNT and not self._try_evict():
                return None
            place = self._entries[at] = _GraphEntry()
        self._entries.move_to_end(at)
        return place

    def _try_evict(self) -> bool:
        """Forget the places that were used longest ago, if that is long."""
        at, oldest = next(iter(self._entries.items()))
        if self._runs_count - oldest.last_run < _UNUSED_RUNS:
            return False
        del self._entries[at]
        return True


class _GraphEntry(Generic[_T]):
    """Places that work was bound to, and its graph once it has one."""

    def __init__(self) -> None:
        self.runs_count = 0
        self.last_run = 0
        self.graph: _T | None = None
