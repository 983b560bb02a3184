"""What a card has written of departing results, with events that are reached when the test says so."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

from deconvd_server.device.cuda.execution.departures import Departures
from deconvd_server.device.departing import Departing


class FakeEvent:
    """Is reached when the test sets it, or when the host waits for it."""

    made: list[FakeEvent]

    def __init__(self) -> None:
        self.is_reached = False
        self.error: Exception | None = None
        self.streams: list[int] = []
        type(self).made.append(self)

    def record(self, stream: int) -> None:
        self.is_reached = False
        self.streams.append(stream)

    def wait(self) -> None:
        if self.error is not None:
            raise self.error
        self.is_reached = True


@pytest.fixture
def events() -> list[FakeEvent]:
    FakeEvent.made = []
    return FakeEvent.made


def departing(told: list[int]) -> Departing:
    return Departing(np.zeros(100, np.uint8), told.append)


def test_downloads_are_told_in_order_and_without_a_wait(events: list[FakeEvent]) -> None:
    told: list[int] = []
    departures, result = Departures(FakeEvent), departing(told)
    for end in (10, 20, 30):
        departures.record(result, end, 7)
    assert [event.streams for event in events] == [[7]] * 3

    departures.note_finished()
    assert told == []
    events[1].is_reached = True
    departures.note_finished()
    assert told == []
    events[0].is_reached = True
    departures.note_finished()
    assert told == [10, 20]
    departures.wait()
    assert told == [10, 20, 30]
    assert events[2].is_reached


def test_events_are_used_again_and_what_was_reached_before_is_not_told(
    events: list[FakeEvent],
) -> None:
    departures = Departures(FakeEvent)
    for _ in range(3):
        told: list[int] = []
        result = departing(told)
        departures.record(result, 50, 7)
        departures.record(result, 100, 7)
        departures.note_finished()
        assert told == []
        departures.wait()
        assert told == [50, 100]
        departures.clear()
    assert len(events) == 2


def test_what_the_card_failed_to_write_is_never_told(events: list[FakeEvent]) -> None:
    told: list[int] = []
    departures, result = Departures(FakeEvent), departing(told)
    departures.record(result, 50, 7)
    departures.record(result, 100, 7)
    events[1].error = RuntimeError("the card has fallen off the bus")
    with pytest.raises(RuntimeError, match="fallen off"):
        departures.wait()
    assert told == [50]
    departures.clear()
    departures.wait()
    departures.note_finished()
    assert told == [50]


def test_no_array_is_kept_once_its_call_has_ended(events: list[FakeEvent]) -> None:
    told: list[int] = []
    departures, result = Departures(FakeEvent), departing(told)
    array = weakref.ref(result.array)
    departures.record(result, 100, 7)
    departures.wait()
    departures.clear()
    del result
    assert array() is None
    assert told == [100]
    assert len(events) == 1
