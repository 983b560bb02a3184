"""Where the time of calls goes: what the client and the ledgers of the server say about each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final

from deconvd_client.calls.ledgers import CallLedger, LedgerRecorder

__all__ = ["PARTS", "CallTimes", "time_call"]

PARTS: Final = ("encode", "there", "queue", "compute", "back")
"""The parts of a call's time, in order."""


@dataclass(frozen=True, slots=True)
class CallTimes:
    """Where the time of a call went, in milliseconds.

    Attributes:
        total_ms: All of it.
        encode_ms: In the client, before it is sent, and after its result is there.
        queue_ms: Waiting for its turn on the device.
        upload_ms: Operands to the device, and the device's waiting for them.
        compute_ms: Computing.
        download_ms: Results from the device.
        travel_ms: All else: the way to the server and back.
    """

    total_ms: float
    encode_ms: float
    queue_ms: float
    upload_ms: float
    compute_ms: float
    download_ms: float
    travel_ms: float

    @classmethod
    def of(cls, total_ms: float, ledgers: Sequence[CallLedger]) -> CallTimes:
        """Return what ledgers say about one call of the user, which may be several calls to the server."""

        def stages_ms(*names: str) -> float:
            return sum(ledger.stages_ms.get(name, 0.0) for ledger in ledgers for name in names)

        called_ms = min(sum(ledger.total_ms for ledger in ledgers), total_ms)
        queue_ms, upload_ms, compute_ms, download_ms = stages = (
            stages_ms("queue"),
            stages_ms("upload", "follow"),
            stages_ms("compute"),
            stages_ms("download"),
        )
        # The stages of a large call overlap. Then each has its share of the time that they take together.
        scale = min(called_ms / sum(stages), 1.0) if sum(stages) else 1.0
        return cls(
            total_ms,
            total_ms - called_ms,
            queue_ms * scale,
            upload_ms * scale,
            compute_ms * scale,
            download_ms * scale,
            max(called_ms - sum(stages) * scale, 0.0),
        )

    @classmethod
    def typical(cls, calls: Sequence[CallTimes]) -> CallTimes:
        """Return the mean of the half of the calls that are neither the fastest nor the slowest."""
        ordered = sorted(calls, key=lambda call: call.total_ms)
        quarter = len(ordered) // 4
        middle = ordered[quarter : len(ordered) - quarter]
        return cls(
            *(statistics.fmean(getattr(call, each.name) for call in middle) for each in fields(cls))
        )

    def parts_ms(self, up: CallTimes, down: CallTimes, smallest: CallTimes) -> dict[str, float]:
        """Return the `PARTS`, whose sum is `total_ms`.

        How much of the travel is the way there, and how much the way back, no clock says: that of the server is
        another one. So calls that move the same bytes in one direction alone say in which proportion they are, beyond
        what the smallest call takes.

        Args:
            up, down: Calls with the same operands and the smallest result, and with the same result and the smallest
                operands.
            smallest: A call with the smallest of both.
        """
        there_ms = max(up.travel_ms - smallest.travel_ms, 0.0)
        back_ms = max(down.travel_ms - smallest.travel_ms, 0.0)
        fixed_ms = min(smallest.travel_ms, self.travel_ms)
        share = there_ms / (there_ms + back_ms) if there_ms + back_ms else 0.5
        there_ms = fixed_ms / 2 + (self.travel_ms - fixed_ms) * share
        values = (
            self.encode_ms,
            there_ms + self.upload_ms,
            self.queue_ms,
            self.compute_ms,
            self.travel_ms - there_ms + self.download_ms,
        )
        return dict(zip(PARTS, values, strict=True))


def time_call(ledgers: LedgerRecorder, call: Callable[[], object]) -> CallTimes:
    """Make a call, and return where its time went."""
    with ledgers.collect() as collected:
        start_s = time.perf_counter()
        call()
        total_ms = (time.perf_counter() - start_s) * 1e3
    return CallTimes.of(total_ms, collected)
