"""The time in which calls have places: for how long there were any, and what each had of the device."""

from __future__ import annotations

import time
from typing import Final

from deconvd_server.call.context import CallContext

__all__ = ["PlaceClock", "PlaceSpan"]

_SMOOTHING: Final = 1 / 16
"""The weight of the newest call in the average."""


class PlaceSpan:
    """The time for which one call has a place.

    Attributes:
        cost_s: What was expected: see `deconvd_server.engine.workload`.
        is_measured: Whether its time says how long such calls take. That of a stream's slice does not: slices overlap.
        place_s: What it was, once it has ended, without pauses.
        share_s: The call's part of it: see `PlaceClock.share_s`.
    """

    __slots__ = ("call", "cost_s", "is_measured", "place_s", "share_s")

    def __init__(self, call: CallContext) -> None:
        self.call = call
        self.cost_s = 0.0
        self.is_measured = False
        self.place_s = 0.0
        self.share_s = 0.0


class PlaceClock:
    """Counts the calls that have a place, and their time. Not thread-safe: `Admission` has a lock.

    Attributes:
        running_count: How many calls have a place.
        now_s: When a call last took its place or gave it back, on the monotonic clock.
        share_s: What a call that had a place all the time would have had of the device, if the calls that ran at the
            same time had equal parts of it: this grows by 1/n a second while n calls run.
        mean_place_s: For how long calls have a place, on average.
    """

    __slots__ = ("_busy_s", "mean_place_s", "now_s", "running_count", "share_s")

    def __init__(self) -> None:
        self.running_count = 0
        self.now_s = 0.0
        self.share_s = 0.0
        self.mean_place_s = 0.0
        self._busy_s = 0.0

    # `begin` and `end` are on each call's way, so they share no function.
    def begin(self, span: PlaceSpan | None = None) -> None:
        """Count one call more, and begin its span."""
        now_s, count = time.monotonic(), self.running_count
        if count:
            passed_s = now_s - self.now_s
            self._busy_s += passed_s
            self.share_s += passed_s / count
        self.now_s, self.running_count = now_s, count + 1
        if span is not None:
            call = span.call
            # until `end`, the span has what to subtract there, where pauses are subtracted, too
            span.place_s, span.share_s = now_s - call.paused_s, self.share_s - call.paused_share_s

    def end(self, span: PlaceSpan | None = None) -> None:
        """Count one call less, and end its span."""
        now_s, count = time.monotonic(), self.running_count
        passed_s = now_s - self.now_s
        self._busy_s += passed_s
        self.share_s += passed_s / count
        self.now_s, self.running_count = now_s, count - 1
        if span is not None:
            call = span.call
            span.place_s = now_s - call.paused_s - span.place_s
            span.share_s = self.share_s - call.paused_share_s - span.share_s
            if span.is_measured:
                mean_s = self.mean_place_s
                self.mean_place_s += (span.place_s - mean_s) * (_SMOOTHING if mean_s else 1.0)

    @property
    def busy_s(self) -> float:
        """For how long at least one call has had a place, so far."""
        running_s = time.monotonic() - self.now_s if self.running_count else 0.0
        return self._busy_s + running_s
