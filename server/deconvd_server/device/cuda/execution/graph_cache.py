"""Decides which work is captured as a graph, and which graphs are kept. Needs no CUDA."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from enum import Enum, auto
from typing import Final, Generic, TypeVar

__all__ = ["GraphCache"]

_T = TypeVar("_T")

_CAPTURE_S: Final = 2e-3
"""About what a capture costs the host, with what makes the graph ready for launches: 1 to 2 ms on an H100's host.

Once as much has been spent to enqueue some work again and again, its capture costs at most as much as it would have
saved. So shapes that come a few times are not captured, and work that is slow to enqueue is captured at once.
"""

_MAX_GRAPHS_COUNT: Final = 32
"""Graphs that are kept for one kind of call, and again for its parts. Its calls use a few blocks of the card in turn.

A graph of a whole call takes 0.3 MB of the card and as much of the host; a graph of a part takes 0.1 and 0.05 MB
(measured on an H100).
"""

_UNUSED_RUNS: Final = 32 * _MAX_GRAPHS_COUNT
"""Runs after which a graph that has not been used is evicted, if another one needs its room."""


class GraphCache(Generic[_T]):
    """Graphs of work that differs only in the addresses that it is bound to. Work that comes often is captured.

    If there are more addresses than graphs can be kept for, some have graphs and the others have none. A capture
    costs as much as many runs without a graph, so a graph in use is not evicted for work that may never come again.

    Args:
        clock: Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._runs_count = 0
        self._entries: OrderedDict[Hashable, _GraphEntry[_T]] = OrderedDict()

    def run(
        self,
        bound_to: Hashable,
        work: Callable[[], None],
        capture: Callable[[], _T | None],
        replay: Callable[[_T], bool],
    ) -> None:
        """Do the work, by its graph if it has one.

        Args:
            bound_to: The addresses that the work is bound to.
            work: Does the work.
            capture: Returns a graph of the work, without doing it; None if no graph can hold it.
            replay: Does the work by its graph; returns False, with nothing done, if it cannot.
        """
        self._runs_count += 1
        entry = self._find_entry(bound_to)
        if entry is None:
            work()
            return
        entry.last_run = self._runs_count
        if entry.state is _CaptureState.PLAIN and entry.enqueued_s >= _CAPTURE_S:
            entry.state = _CaptureState.TRIED  # once alone: a capture that failed would fail again
            entry.graph = capture()
        if entry.graph is None or not replay(entry.graph):
            self._enqueue(entry, work)

    def _enqueue(self, entry: _GraphEntry[_T], work: Callable[[], None]) -> None:
        """Do the work without a graph, and note how long that took."""
        begin_s = self._clock()
        work()
        if entry.state is _CaptureState.NEW:  # what is loaded at first use took most of the time
            entry.state = _CaptureState.PLAIN
        else:
            entry.enqueued_s += self._clock() - begin_s

    def _find_entry(self, bound_to: Hashable) -> _GraphEntry[_T] | None:
        """Return the entry of some addresses, a new one if need be; None if there is no room for a new one."""
        entry = self._entries.get(bound_to)
        if entry is None:
            if len(self._entries) >= _MAX_GRAPHS_COUNT and not self._try_evict():
                return None
            entry = self._entries[bound_to] = _GraphEntry()
        self._entries.move_to_end(bound_to)
        return entry

    def _try_evict(self) -> bool:
        """Evict the entry that was used longest ago, if that is long ago."""
        bound_to, oldest = next(iter(self._entries.items()))
        if self._runs_count - oldest.last_run < _UNUSED_RUNS:
            return False
        del self._entries[bound_to]
        return True


class _CaptureState(Enum):
    """State of work: NEW before its first run, then PLAIN, and TRIED from the attempt to capture it on."""

    NEW = auto()
    PLAIN = auto()
    TRIED = auto()


class _GraphEntry(Generic[_T]):
    """Work that came with some addresses, how long it took to enqueue, and its graph once it has one."""

    def __init__(self) -> None:
        self.state = _CaptureState.NEW
        self.enqueued_s = 0.0
        self.last_run = 0
        self.graph: _T | None = None
