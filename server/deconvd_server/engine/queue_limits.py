"""The limits of the queue of calls: which may join it, and how long each waits until it checks again."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from deconvd_server.call.context import CallContext
from deconvd_server.engine.answer_shares import SMALL_BYTES
from deconvd_server.engine.fair_queue import FairQueue, Ticket

__all__ = ["QueueLimits", "Refusal", "RefusalReason", "WaitLimit", "longest_wait_s"]

_FREE_WAIT_S: Final = 0.03
"""How long any call may wait for others: short calls need not be as fast as alone."""

_STRETCH: Final = 2.2
"""How much longer a call may take for others, as a multiple of what it takes alone: for two that come at once."""

_OVERLOADED_STRETCH: Final = 1.5
"""The same while the device has too much to do: for one other. On a busy machine both then take somewhat longer."""


class RefusalReason(StrEnum):
    """Why a call is refused."""

    PLACES = "places"
    """As many calls wait as may."""

    BYTES = "bytes"
    """Calls that wait have sent as many bytes as they may."""

    TIME = "time"
    """It would wait for too long."""

    RESIDENTS = "residents"
    """Residents leave it no room."""


class Refusal(NamedTuple):
    """Why a call is refused, and in words."""

    reason: RefusalReason
    text: str


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many calls may wait, and how many bytes they may have received.

    Both are shared by peers as `_may_take` says.

    Attributes:
        waiting_count: How many calls may wait. One peer alone may have half of these places.
        waiting_bytes: How many bytes waiting calls may have received, together, without small calls. A call may have
            more if no other waits.
    """

    waiting_count: int
    waiting_bytes: int

    def refusal(self, ticket: Ticket, queue: FairQueue) -> Refusal | None:
        """Return why a call may not join the queue; None if it may."""
        counts, peer = queue.counts, ticket.peer
        if not _may_take(1, peer, counts, self.waiting_count - len(queue)):
            return Refusal(
                RefusalReason.PLACES,
                f"the server is full: {len(queue)} calls wait already, of at most {self.waiting_count}, and "
                f"{counts.get(peer, 0)} of them are of the same peer",
            )
        if ticket.brought_bytes <= SMALL_BYTES:
            return None
        by_peer: dict[str, int] = {}
        for other in queue:
            if other.brought_bytes > SMALL_BYTES:
                by_peer[other.peer] = by_peer.get(other.peer, 0) + other.brought_bytes
        others_bytes = sum(by_peer.values())
        free_bytes = self.waiting_bytes - others_bytes
        if by_peer and not _may_take(ticket.brought_bytes, peer, by_peer, free_bytes):
            return Refusal(
                RefusalReason.BYTES,
                f"the server is full: calls that wait have sent {others_bytes} bytes already, of at most "
                f"{self.waiting_bytes}, and {by_peer.get(peer, 0)} of them are of the same peer; this one has sent "
                f"{ticket.brought_bytes}",
            )
        return None


@dataclass(frozen=True, slots=True)
class WaitLimit:
    """How long a call may wait for others, by the estimate when it comes.

    Attributes:
        longest_s: The limit; None for as long as others would make it take three times as long as alone, or until
            the deadline of a caller who would rather wait.
    """

    longest_s: float | None = None

    def limit_s(
        self, cost_s: float, remaining_s: float | None, *, is_overloaded: bool, waits: bool = False
    ) -> float:
        """Return the limit for a call.

        Args:
            cost_s: How long it takes alone.
            remaining_s: Seconds until its deadline; None if it has none.
            is_overloaded: Whether more comes than the device can do. Then a queue does not help, as it stays full.
            waits: Whether the caller would rather wait. It would come back if it were refused, and the device might be
                idle until then.
        """
        limit_s = self.longest_s
        if limit_s is None and waits:
            limit_s = math.inf
        if limit_s is None:
            stretch = _OVERLOADED_STRETCH if is_overloaded else _STRETCH
            limit_s = max(_FREE_WAIT_S, stretch * cost_s)
        return limit_s if remaining_s is None else min(limit_s, remaining_s)


def longest_wait_s(ticket: Ticket, call: CallContext) -> float | None:
    """Return how long a queued call may wait until it checks again; None if until it is notified."""
    patient_s = ticket.patient_until_s - time.monotonic()
    remaining_s = call.remaining_s()
    if patient_s <= 0:
        return remaining_s
    return patient_s if remaining_s is None else min(patient_s, remaining_s)


def _may_take(size: int, peer: str, taken: Mapping[str, int], free: int) -> bool:
    """Return whether a peer may take more of what waiting calls share, which are places or bytes.

    A peer that has none may take all that is free. Another may take more as long as there is then, for each peer that
    has some, as much free as this one has. So n peers that take what they can, and give nothing back, leave at least
    one part in n + 1; one peer alone may have half.

    Args:
        taken: What each peer has, without those that have none.
    """
    own = taken.get(peer, 0)
    if not own:
        return size <= free
    return (own + size) * len(taken) <= free - size
