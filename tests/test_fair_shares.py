"""Places that peers share: one may have nearly all, and gives way as others ask; none are ever lost."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deconvd.errors import UnavailableError
from deconvd_server.resources.fair_shares import FairShares, PeerPlace

PEERS = "abcd"


def nothing() -> None:
    """What gives way to nobody in these tests."""


def shares(places_count: int = 8, reserved_count: int = 1) -> FairShares:
    return FairShares(places_count, reserved_count, "streams")


def take_all(places: FairShares, peer: str) -> list[PeerPlace]:
    taken = list[PeerPlace]()
    with suppress(UnavailableError):
        while len(taken) < 100:  # more than there are
            taken.append(places.take(peer, nothing))
    return taken


def test_a_lone_peer_takes_all_but_the_reserve() -> None:
    places = shares(8, 1)

    assert len(take_all(places, "a")) == 7
    with pytest.raises(
        UnavailableError, match="no place for more streams: 7 of 8 are taken, 7 of them by a"
    ) as caught:
        places.take("a", nothing)
    assert caught.value.retry_after_s == 0.5


def test_the_reserve_is_for_a_peer_that_has_none_and_nobody_gives_way() -> None:
    places = shares(8, 1)
    take_all(places, "a")

    places.take("b", nothing)

    assert places.count_of("a") == 7
    assert places.count_of("b") == 1


def test_who_has_most_gives_way_until_all_have_the_same() -> None:
    places = shares(8, 1)
    take_all(places, "a")

    assert len(take_all(places, "b")) == 4
    assert places.count_of("a") == 4
    assert places.taken_count == 8


def test_the_place_without_progress_for_longest_gives_way_but_an_idle_one_first() -> None:
    places = shares(4, 0)
    gone: list[str] = []
    names = ["stale", "at work", "fresh", "idle"]
    stale, at_work, fresh, idle = (places.take("a", partial(gone.append, name)) for name in names)
    stale.progressed_s, at_work.progressed_s = 0, float("inf")
    fresh.note_progress()
    idle.note_progress()
    idle.is_idle = True

    places.take("b", nothing)
    places.take("c", nothing)

    assert gone == ["idle", "stale"]


def test_an_idle_place_of_ones_own_makes_room_for_another_of_ones_own() -> None:
    places = shares(4, 0)
    gone: list[int] = []
    held = [places.take("a", partial(gone.append, number)) for number in range(4)]
    held[2].is_idle = True

    places.take("a", nothing)

    assert gone == [2]
    with pytest.raises(UnavailableError):
        places.take("a", nothing)


def test_an_idle_place_of_a_peer_that_has_one_gives_way_to_a_peer_that_has_none() -> None:
    places = shares(2, 0)
    places.take("a", nothing)
    places.take("b", nothing).is_idle = True

    places.take("c", nothing)

    assert [places.count_of(peer) for peer in "abc"] == [1, 0, 1]


def test_an_idle_place_of_a_peer_that_has_as_many_does_not_give_way() -> None:
    places = shares(2, 0)
    places.take("a", nothing)
    places.take("b", nothing).is_idle = True

    with pytest.raises(UnavailableError):
        places.take("a", nothing)

    assert [places.count_of(peer) for peer in "ab"] == [1, 1]


def test_what_gave_way_can_be_freed_and_freeing_twice_is_harmless() -> None:
    places = shares(2, 0)
    first, second = places.take("a", nothing), places.take("a", nothing)
    places.take("b", nothing)

    for place in (first, second, first, second):
        place.free()

    assert places.taken_count == 1
    assert places.count_of("a") == 0


def test_no_more_are_on_their_way_out_than_there_are_places() -> None:
    places = shares(2, 0)
    for _ in range(2):  # one of a's two gives way each time, and nobody frees it
        take_all(places, "a")
        places.take("b", nothing).free()
    take_all(places, "a")

    with pytest.raises(UnavailableError):
        places.take("b", nothing)


def test_one_that_fails_to_give_way_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("on purpose")

    places = shares(2, 0)
    for _ in range(2):
        places.take("a", fail)

    places.take("b", nothing)

    assert places.count_of("b") == 1
    assert "preempting one of the streams failed" in caplog.text


def test_threads_that_take_and_free_at_once_lose_no_place() -> None:
    places = shares(8, 1)
    begin = threading.Barrier(4)

    def work(peer: str) -> None:
        begin.wait()
        for _ in range(2000):
            with suppress(UnavailableError):
                held = [places.take(peer, nothing), places.take(peer, nothing)]
                for place in held:
                    place.free()
            for place in list(places._places.get(peer, ())):
                place.free()

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, peer) for peer in PEERS]:
            done.result()

    assert places.taken_count == 0
    assert not places._preempted


class SharesMachine(RuleBasedStateMachine):
    """Peers take, free and give way in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.places = FairShares(6, 2, "streams")
        self.held: list[PeerPlace] = []
        self.told: list[PeerPlace] = []

    def give_way(self, taken: list[PeerPlace]) -> None:
        self.held.remove(taken[0])
        self.told.append(taken[0])

    @rule(peer=st.sampled_from(PEERS))
    def take(self, peer: str) -> None:
        before = Counter(place.peer for place in self.held)
        most = max(before.values(), default=0)
        free_count = 6 - before.total()
        taken: list[PeerPlace] = []
        try:
            taken.append(self.places.take(peer, lambda: self.give_way(taken)))
        except UnavailableError:
            assert free_count <= (2 if before[peer] else 0)
            may_go = [
                place
                for place in self.held
                if place.is_idle and (place.peer == peer or before[place.peer] > before[peer])
            ]
            assert (most < before[peer] + 2 and not may_go) or len(self.told) >= 6
        else:
            self.held += taken

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(self.held))
        self.held.remove(place)
        place.free()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), is_idle=st.booleans())
    def begin_or_end(self, data: st.DataObject, is_idle: bool) -> None:
        place = data.draw(st.sampled_from(self.held))
        place.is_idle = is_idle
        place.note_progress()

    @precondition(lambda self: self.told)
    @rule()
    def leave(self) -> None:
        self.told.pop().free()

    @invariant()
    def counts_agree(self) -> None:
        counts = Counter(place.peer for place in self.held)
        assert self.places.taken_count == counts.total() <= 6
        assert {peer: self.places.count_of(peer) for peer in PEERS} == {
            peer: counts[peer] for peer in PEERS
        }
        assert len(self.told) <= 6


TestShares = SharesMachine.TestCase
TestShares.settings = settings(max_examples=200)
