"""A clock that tests move."""

from __future__ import annotations

from types import ModuleType

import pytest

__all__ = ["StandingClock", "stop_clock"]


class StandingClock:
    """A clock that stands still until a test sets it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Return the time, as `time.monotonic` does."""
        return self.now_s


def stop_clock(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> StandingClock:
    """Return a clock that some modules have instead of `time`."""
    clock = StandingClock()
    for module in modules:
        monkeypatch.setattr(module, "time", clock)
    return clock
