"""The ledger of a call: where its time went on the server. The caller gets it with the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from enum import StrEnum

from deconvd.wire.ledger import METADATA_KEY, OVERLAP_ENTRY

__all__ = ["Ledger", "Stage", "StageSpan"]


class Stage(StrEnum):
    """A stage of a call's work on the server. The slices of a stream overlap, and their times are added up."""

    QUEUE = "queue_us"
    """Waiting for its turn on the device."""

    OVERLAP = OVERLAP_ENTRY
    """In an overlapped call: waiting for operands to arrive, while what has arrived is uploaded and computed."""

    UPLOAD = "upload_us"
    """Operands to the device."""

    COMPUTE = "compute_us"
    """The operation itself."""

    DOWNLOAD = "download_us"
    """Results from the device."""

    SERVER = "server_us"
    """The whole call, from the arrival of the request to the end of the response."""


class Ledger:
    """The microseconds of each stage of a call. The call begins when this object is made. Thread-safe.

    Attributes:
        began_s: When the call began, by `time.perf_counter`.
        times_us: The stages so far. Only this object changes it.
    """

    def __init__(self) -> None:
        self.began_s = time.perf_counter()
        self._lock = threading.Lock()
        self.times_us = {Stage.QUEUE: 0}

    def add(self, stage: Stage, duration_s: float) -> None:
        """Add a time to a stage."""
        with self._lock:
            before_us = self.times_us.get(stage, 0)
            self.times_us[stage] = before_us + round(duration_s * 1e6)

    def add_all(self, durations_s: Iterable[tuple[Stage, float]]) -> None:
        """Add times to stages."""
        with self._lock:
            for stage, duration_s in durations_s:
                before_us = self.times_us.get(stage, 0)
                self.times_us[stage] = before_us + round(duration_s * 1e6)

    def measure(self, stage: Stage) -> StageSpan:
        """Add the time that a ``with`` block takes to a stage."""
        return StageSpan(self, stage)

    def as_text(self) -> str:
        """Return the stages, and the time until now as the whole call's, in the form of `deconvd.wire.ledger`."""
        server_us = round((time.perf_counter() - self.began_s) * 1e6)
        with self._lock:
            entries = [*self.times_us.items(), (Stage.SERVER, server_us)]
        return ";".join(map("%s=%d".__mod__, entries))

    def as_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return `as_text` as gRPC metadata."""
        return ((METADATA_KEY, self.as_text()),)


class StageSpan:
    """A block whose time is added to a stage. See `Ledger.measure`."""

    __slots__ = ("_ledger", "_stage", "_start_s")

    def __init__(self, ledger: Ledger, stage: Stage) -> None:
        self._ledger = ledger
        self._stage = stage

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._ledger.add(self._stage, time.perf_counter() - self._start_s)
