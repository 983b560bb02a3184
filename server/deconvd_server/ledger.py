"""Where a call's time went, for its caller."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum

from deconvd.ledger import METADATA_KEY

__all__ = ["Ledger", "Stage"]


class Stage(StrEnum):
    """A part of a call's work on the server. Those of a stream's slices overlap, and add up."""

    QUEUE = "queue_us"
    """Waiting for its turn on the device."""

    UPLOAD = "upload_us"
    """Operands to the device."""

    COMPUTE = "compute_us"
    """The operation itself."""

    DOWNLOAD = "download_us"
    """Results from the device."""

    SERVER = "server_us"
    """All of it, from the request's arrival to the end of the response."""


class Ledger:
    """Microseconds by stage. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._microseconds: Counter[Stage] = Counter()

    def add(self, stage: Stage, duration_s: float) -> None:
        """Count a time towards a stage."""
        with self._lock:
            self._microseconds[stage] += round(duration_s * 1e6)

    @contextmanager
    def timing(self, stage: Stage) -> Iterator[None]:
        """Count the time that the block takes towards a stage."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage, time.perf_counter() - start_s)

    def as_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return what is counted as gRPC metadata."""
        with self._lock:
            entries = sorted(self._microseconds.items())
        return ((METADATA_KEY, ";".join(f"{stage}={value}" for stage, value in entries)),)
