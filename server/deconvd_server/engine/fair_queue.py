"""The queue of calls that wait to start, in an order that is fair between peers.

Start-time fair queueing: each peer has a clock of its own, which goes on by the cost of each of its calls. The call
whose peer's clock is least comes first, and among equals the one that came first. A peer that has called nothing
meanwhile starts at the clock of the call that started last, so it gets no credit for its silence.
"""

from __future__ import annotations

import threading
from bisect import insort
from dataclasses import dataclass
from typing import Final

__all__ = ["FairQueue", "Ticket"]

_LEAST_COST_S: Final = 1e-4
"""What the smallest call costs: calls that count as no work take turns all the same."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A call in the queue.

    Attributes:
        lasting_bytes, brought_bytes: See `Admission.admit`.
        peer: Key of the peer that the call counts for.
        patient_until_s: Until when it may block the queue while answers are being sent, on the monotonic clock.
        changed: Notified when it may start, or when its call was cancelled.
        cost_s: How long the call takes alone, as far as known.
        start_s: What its peer's clock showed when it came.
    """

    footprint_bytes: int
    lasting_bytes: int
    brought_bytes: int
    peer: str
    patient_until_s: float
    changed: threading.Condition
    cost_s: float = 0.0
    start_s: float = 0.0


class FairQueue(list[Ticket]):
    """The tickets of calls that wait, the next one first. Not thread-safe: `Admission` has a lock.

    The calls of one peer keep their order. No call waits for ever: whoever comes later has a clock that is not behind
    that of the calls that have started. Only `add` and `take_out` may change it. It is a list, since each call asks
    whether it is empty.

    Attributes:
        counts: How many calls of each peer wait, by peer, without peers that have none. Others only read it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self._started_s = 0.0
        self._clocks_s: dict[str, float] = {}  # by peer

    def add(self, ticket: Ticket) -> None:
        """Add a call at its place."""
        ticket.start_s = max(self._clocks_s.get(ticket.peer, 0.0), self._started_s)
        self._clocks_s[ticket.peer] = ticket.start_s + max(ticket.cost_s, _LEAST_COST_S)
        insort(self, ticket, key=_start_of)
        self.counts[ticket.peer] = self.counts.get(ticket.peer, 0) + 1

    def take_out(self, ticket: Ticket, *, has_started: bool) -> None:
        """Take out a call that starts, or that gives up: its peer does not pay for it then."""
        self.remove(ticket)
        self.counts[ticket.peer] -= 1
        if not self.counts[ticket.peer]:
            del self.counts[ticket.peer]
        if not self:
            self._started_s = 0.0
            self._clocks_s.clear()
        elif has_started:
            self._started_s = max(self._started_s, ticket.start_s)
        elif ticket.peer in self._clocks_s:
            self._clocks_s[ticket.peer] -= max(ticket.cost_s, _LEAST_COST_S)
        if len(self._clocks_s) > 2 * len(self):
            # a clock that is behind says the same as none
            self._clocks_s = {p: s for p, s in self._clocks_s.items() if s > self._started_s}


def _start_of(ticket: Ticket) -> float:
    return ticket.start_s
