"""Notes what the card has written of results that leave while their call is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from deconvd_server.device.departing import Departing

__all__ = ["CopyEvent", "Departures"]


class CopyEvent(Protocol):
    """A point behind a copy in a stream. See `Event`."""

    @property
    def is_reached(self) -> bool: ...

    def record(self, stream: int) -> None: ...

    def wait(self) -> None: ...


class Departures:
    """The downloads of a call's departing results, in the order of one stream. Each has an event behind it.

    Serves one call at a time. Events are made when a call first needs that many, and used again by later calls.

    Args:
        make_event: Returns a new event.
    """

    def __init__(self, make_event: Callable[[], CopyEvent]) -> None:
        self._make_event = make_event
        self._events: list[CopyEvent] = []
        self._downloads: list[tuple[Departing, int]] = []
        self._noted_count = 0

    def record(self, result: Departing, size_bytes: int, stream: int) -> None:
        """Record, behind a download, that it makes the first `size_bytes` of a result final."""
        number = len(self._downloads)
        if number == len(self._events):
            self._events.append(self._make_event())
        self._events[number].record(stream)
        self._downloads.append((result, size_bytes))

    def note_finished(self) -> None:
        """Note the downloads that the card has finished. The host does not wait."""
        while self._noted_count < len(self._downloads) and self._next_event.is_reached:
            self._note_next()

    def wait(self) -> None:
        """Note all downloads, each as soon as the card has finished it.

        Raises:
            CudaError: The card failed. What is not noted by then is not final.
        """
        while self._noted_count < len(self._downloads):
            self._next_event.wait()
            self._note_next()

    def clear(self) -> None:
        """Forget the call, which may have failed. Its arrays must not be kept."""
        self._downloads.clear()
        self._noted_count = 0

    @property
    def _next_event(self) -> CopyEvent:
        return self._events[self._noted_count]

    def _note_next(self) -> None:
        result, size_bytes = self._downloads[self._noted_count]
        self._noted_count += 1
        result.note_written(size_bytes)
