"""The limits of the queue of calls: which may join it, and how long each waits until it checks again."""

from __future__ import annotations

import math
import time
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

    Attributes:
        waiting_count: How many calls may wait.
        reserved_count: How many of these places are for peers that have no waiting call, and the same part of
            `waiting_bytes`.
        waiting_bytes: How many bytes waiting calls may have received, together. A call may have more if no other waits.
    """

    waiting_count: int
    reserved_count: int
    waiting_bytes: int

    def refusal(self, ticket: Ticket, queue: FairQueue) -> Refusal | None:
        """Return why a call may not join the queue; None if it may."""
        is_alone = all(other.peer != ticket.peer for other in queue)
        limit_count = self.waiting_count - (0 if is_alone else self.reserved_count)
        if len(queue) >= limit_count:
            return Refusal(
                RefusalReason.PLACES, f"the server is full: {len(queue)} calls wait already"
            )
        if ticket.brought_bytes <= SMALL_BYTES:
            return None
        others_bytes = sum([other.brought_bytes for other in queue])
        limit_bytes = self.waiting_bytes * limit_count // self.waiting_count
        if others_bytes and others_bytes + ticket.brought_bytes > limit_bytes:
            return Refusal(
                RefusalReason.BYTES,
                f"the server is full: calls that wait have sent {others_bytes} bytes already, of at most "
                f"{limit_bytes}, and this one has sent {ticket.brought_bytes}",
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
