"""Work is captured once that is sure to pay, and graphs are kept for as many places as there is room."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from deconvd_server.device.cuda.execution.graph_cache import GraphCache


class Card:
    """Notes how work was done, by the place that it was bound to.

    Args:
        enqueue_s: How long it takes to enqueue work, but the first time, which takes a second.
    """

    def __init__(
        self, *, can_capture: bool = True, can_replay: bool = True, enqueue_s: float = 0.01
    ) -> None:
        self.now_s = 0.0
        self.graphs: GraphCache[str] = GraphCache(lambda: self.now_s)
        self.done: list[str] = []
        self.captured: list[object] = []
        self._can_capture, self._can_replay = can_capture, can_replay
        self._enqueue_s = enqueue_s
        self._loaded: set[object] = set()

    def run(self, at: object) -> None:
        """Do the work at a place."""

        def work() -> None:
            self.now_s += self._enqueue_s if at in self._loaded else 1.0
            self._loaded.add(at)
            self.done.append(f"work at {at}")

        def capture() -> str | None:
            self.captured.append(at)
            return f"graph of {at}" if self._can_capture else None

        def replay(graph: str) -> bool:
            if self._can_replay:
                self.done.append(graph)
            return self._can_replay

        self.graphs.run(at, work, capture, replay)


def test_slow_work_is_captured_when_it_has_come_again_and_replayed_from_then_on() -> None:
    card = Card()
    for at in (1, 2, 1, 1, 1, 2, 2):
        card.run(at)

    assert card.done == [
        *("work at 1", "work at 2", "work at 1", "graph of 1", "graph of 1"),
        *("work at 2", "graph of 2"),
    ]
    assert card.captured == [1, 2]


def test_quick_work_is_captured_once_its_runs_have_cost_as_much_as_a_capture() -> None:
    card = Card(enqueue_s=0.25e-3)
    for run in range(20):
        card.run(1)
        if run < 9:  # the first one loads what is needed, and tells nothing; eight take 2 ms
            assert card.captured == []

    assert card.done == ["work at 1"] * 9 + ["graph of 1"] * 11
    assert card.captured == [1]


def test_what_no_graph_can_hold_is_tried_once() -> None:
    card = Card(can_capture=False)
    for _ in range(5):
        card.run(1)

    assert card.done == ["work at 1"] * 5
    assert card.captured == [1]


def test_work_whose_graph_cannot_be_replayed_is_done_without_it() -> None:
    card = Card(can_replay=False)
    for _ in range(5):
        card.run(1)

    assert card.done == ["work at 1"] * 5
    assert card.captured == [1]


@pytest.mark.parametrize("order", ["in turn", "at random"])
@pytest.mark.parametrize("places_count", [4, 32, 33, 128])
def test_more_places_than_graphs_make_no_graph_give_way_to_another(
    places_count: int, order: str
) -> None:
    card, generator = Card(), random.Random(0)
    for i in range(8000):
        card.run(i % places_count if order == "in turn" else generator.randrange(places_count))

    replayed_count = sum(done.startswith("graph") for done in card.done)
    assert replayed_count > 0.8 * 8000 * min(32 / places_count, 1)
    # at random some place may be unlucky for long, and another take its room
    assert len(card.captured) <= (min(places_count, 32) if order == "in turn" else 80)


def test_a_place_makes_room_once_1024_runs_have_passed_it_by() -> None:
    card = Card()
    for place in range(32):
        card.run(place)
    for _ in range(1023 - 32):
        card.run(31)

    for _ in range(3):  # runs 1024, in which the first place still is known, to 1026
        card.run("new")
    assert "new" not in card.captured
    card.run("new")
    assert card.captured == [31, "new"]


def test_places_that_come_no_more_make_room() -> None:
    card = Card()
    for epoch in range(5):  # as when what is registered changes: all addresses are others
        for _ in range(100):
            for place in range(8):
                card.run((epoch, place))

    captured = [place for place in card.captured if isinstance(place, tuple)]
    assert Counter(epoch for epoch, _ in captured) == dict.fromkeys(range(5), 8)
