"""Where a call's time went, for its caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from enum import StrEnum

from deconvd.wire.ledger import METADATA_KEY, OVERLAP_ENTRY

__all__ = ["Ledger", "Stage", "StageSpan"]


class Stage(StrEnum):
    """A part of a call's work on the server. Those of a stream's slices overlap, and add up."""

    QUEUE = "queue_us"
    """Waiting for its turn on the device."""

    OVERLAP = OVERLAP_ENTRY
    """Of an early call: waiting for operands to be written while others, and parts, are uploaded and computed."""

    UPLOAD = "upload_us"
    """Operands to the device."""

    COMPUTE = "compute_us"
    """The operation itself."""

    DOWNLOAD = "download_us"
    """Results from the device."""

    SERVER = "server_us"
    """All of it, from the request's arrival to the end of the response."""


class Ledger:
    """Microseconds by stage, of a call that begins with it. Thread-safe."""

    def __init__(self) -> None:
        self._begin_s = time.perf_counter()
        self._lock = threading.Lock()
        self._microseconds = {Stage.QUEUE: 0}

    def add(self, stage: Stage, duration_s: float) -> None:
        """Count a time towards a stage."""
        with self._lock:
            before_us = self._microseconds.get(stage, 0)
            self._microseconds[stage] = before_us + round(duration_s * 1e6)

    def add_all(self, durations_s: Iterable[tuple[Stage, float]]) -> None:
        """Count times towards stages."""
        with self._lock:
            for stage, duration_s in durations_s:
                before_us = self._microseconds.get(stage, 0)
                self._microseconds[stage] = before_us + round(duration_s * 1e6)

    def measure(self, stage: Stage) -> StageSpan:
        """Count the time that a ``with`` block takes towards a stage."""
        return StageSpan(self, stage)

    def as_text(self) -> str:
        """Return what is counted, and the time until now as all of it, as `deconvd.wire.ledger` reads it."""
        server_us = round((time.perf_counter() - self._begin_s) * 1e6)
        with self._lock:
            entries = [*self._microseconds.items(), (Stage.SERVER, server_us)]
        return ";".join(map("%s=%d".__mod__, entries))

    def as_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return `as_text` as gRPC metadata."""
        return ((METADATA_KEY, self.as_text()),)


class StageSpan:
    """A block whose time counts towards a stage. See `Ledger.timing`."""

    __slots__ = ("_ledger", "_stage", "_start_s")

    def __init__(self, ledger: Ledger, stage: Stage) -> None:
        self._ledger = ledger
        self._stage = stage

    def __enter__(self) -> None:
        self._start_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._ledger.add(self._stage, time.perf_counter() - self._start_s)
