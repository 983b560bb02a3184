"""The queue of calls that wait to start: which may join it, and how long each waits until it checks again."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from deconvd.errors import UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.engine.answer_shares import SMALL_BYTES

__all__ = ["RETRY_AFTER_S", "QueueLimits", "Ticket", "longest_wait_s"]

RETRY_AFTER_S: Final = 0.5
"""How long a refused caller should wait: about the time in which a queue of small calls shrinks."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A call in the queue.

    Attributes:
        lasting_bytes, brought_bytes: See `Admission.admit`.
        peer: Key of the peer that the call counts for.
        patient_until_s: Until when it may block the queue while answers are being sent, on the monotonic clock.
        changed: Notified when it may start, or when its call was cancelled.
    """

    footprint_bytes: int
    lasting_bytes: int
    brought_bytes: int
    peer: str
    patient_until_s: float
    changed: threading.Condition


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

    def check(self, ticket: Ticket, queue: Collection[Ticket]) -> None:
        """Raise UnavailableError if a call may not join the queue."""
        is_alone = all(other.peer != ticket.peer for other in queue)
        limit_count = self.waiting_count - (0 if is_alone else self.reserved_count)
        if len(queue) >= limit_count:
            raise UnavailableError(
                f"the server is full: {len(queue)} calls wait already", retry_after_s=RETRY_AFTER_S
            )
        if ticket.brought_bytes <= SMALL_BYTES:
            return
        others_bytes = sum([other.brought_bytes for other in queue])
        limit_bytes = self.waiting_bytes * limit_count // self.waiting_count
        if others_bytes and others_bytes + ticket.brought_bytes > limit_bytes:
            raise UnavailableError(
                f"the server is full: calls that wait have sent {others_bytes} bytes already, of at most "
                f"{limit_bytes}, and this one has sent {ticket.brought_bytes}",
                retry_after_s=RETRY_AFTER_S,
            )


def longest_wait_s(ticket: Ticket, call: CallContext) -> float | None:
    """Return how long a queued call may wait until it checks again; None if until it is notified."""
    patient_s = ticket.patient_until_s - time.monotonic()
    remaining_s = call.remaining_s()
    if patient_s <= 0:
        return remaining_s
    return patient_s if remaining_s is None else min(patient_s, remaining_s)
