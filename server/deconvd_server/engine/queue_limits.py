"""The line of calls that wait to start: who may join it, and how long each waits until it looks again."""

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
"""What a refused caller is told: about the time that a queue of small calls takes to shrink."""


@dataclass(frozen=True, slots=True, eq=False)
class Ticket:
    """A call in the line.

    Attributes:
        lasting_bytes, brought_bytes: See `Admission.admitted`.
        peer: By what its peer is counted.
        patient_until_s: Until when it may keep others waiting for answers to leave, on the monotonic clock.
        changed: Notified when it is first and may start, or when its caller has gone.
    """

    footprint_bytes: int
    lasting_bytes: int
    brought_bytes: int
    peer: str
    patient_until_s: float
    changed: threading.Condition


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How many calls may wait, and what they may have brought.

    Attributes:
        waiting_count: How many may wait.
        reserved_count: How many of these places are for peers of which no call waits; and the same part of
            `waiting_bytes`.
        waiting_bytes: What those who wait may have brought all together. One may have brought more, if no other waits.
    """

    waiting_count: int
    reserved_count: int
    waiting_bytes: int

    def check(self, ticket: Ticket, line: Collection[Ticket]) -> None:
        """Return if a call may join the line. Raises UnavailableError if not."""
        is_alone = all(other.peer != ticket.peer for other in line)
        limit_count = self.waiting_count - (0 if is_alone else self.reserved_count)
        if len(line) >= limit_count:
            raise UnavailableError(
                f"the server is full: {len(line)} calls wait already", retry_after_s=RETRY_AFTER_S
            )
        if ticket.brought_bytes <= SMALL_BYTES:
            return
        others_bytes = sum([other.brought_bytes for other in line])
        limit_bytes = self.waiting_bytes * limit_count // self.waiting_count
        if others_bytes and others_bytes + ticket.brought_bytes > limit_bytes:
            raise UnavailableError(
                f"the server is full: calls that wait have brought {others_bytes} bytes already, of "
                f"{limit_bytes} that they may, and this one has {ticket.brought_bytes}",
                retry_after_s=RETRY_AFTER_S,
            )


def longest_wait_s(ticket: Ticket, call: CallContext) -> float | None:
    """Return for how long a call in the line may wait before it looks again; None if until it is told."""
    patient_s = ticket.patient_until_s - time.monotonic()
    remaining_s = call.remaining_s()
    if patient_s <= 0:
        return remaining_s
    return patient_s if remaining_s is None else min(patient_s, remaining_s)
