"""The queue's places are shared by peers: those that take what they can leave others some, and one alone has enough."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deconvd_server.engine.fair_queue import FairQueue, Ticket
from deconvd_server.engine.queue_limits import QueueLimits, RefusalReason

PLACES_COUNT = 144
MIB = 1 << 20
LIMITS = QueueLimits(PLACES_COUNT, 48 * MIB)


def ticket(peer: str, brought_bytes: int = 0) -> Ticket:
    return Ticket(1, 0, brought_bytes, peer, 0.0, threading.Condition())


def join(queue: FairQueue, peer: str, brought_bytes: int = 0) -> bool:
    """Return whether a peer's call was let into the queue."""
    one = ticket(peer, brought_bytes)
    if LIMITS.refusal(one, queue) is not None:
        return False
    queue.add(one)
    return True


def fill(queue: FairQueue, peer: str, brought_bytes: int = 0) -> int:
    """Have a peer make calls until one is refused, and return how many were not."""
    count = 0
    while join(queue, peer, brought_bytes):
        count += 1
    return count


def test_one_peer_alone_has_half_of_the_places() -> None:
    assert fill(FairQueue(), "a") == PLACES_COUNT // 2


@pytest.mark.parametrize("peers_count", range(1, 12))
def test_peers_that_take_what_they_can_leave_one_part_more_than_they_are(peers_count: int) -> None:
    """One after the other takes what it can, and none of their calls starts, as if nobody read answers."""
    queue = FairQueue()
    for number in range(peers_count):
        fill(queue, f"greedy {number}")

    assert PLACES_COUNT - len(queue) >= PLACES_COUNT / (peers_count + 1)
    assert join(queue, "newcomer")


def test_a_newcomer_beside_a_greedy_peer_has_several_places() -> None:
    queue = FairQueue()
    fill(queue, "greedy")

    assert fill(queue, "newcomer") == PLACES_COUNT // 2 // 3


@pytest.mark.parametrize("peers_count", [2, 4, 8])
def test_peers_that_come_at_the_same_time_have_equal_shares_of_half(peers_count: int) -> None:
    queue = FairQueue()
    for _ in range(PLACES_COUNT):
        for number in range(peers_count):
            join(queue, f"peer {number}")

    share_count = PLACES_COUNT // 2 // peers_count
    assert len(queue) == peers_count * share_count
    assert set(queue.counts.values()) == {share_count}


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 10), st.integers(1, 80), st.booleans()), min_size=1, max_size=60
    )
)
def test_whatever_comes_and_goes_some_places_are_left(steps: list[tuple[int, int, bool]]) -> None:
    """Each step has a peer's calls come or go, as many as are let in or are there."""
    queue = FairQueue()
    for number, count, comes in steps:
        peer = f"peer {number}"
        for _ in range(count):
            own = [one for one in queue if one.peer == peer]
            if comes:
                join(queue, peer)
            elif own:
                queue.take_out(own[0], has_started=True)

        counts = {one.peer: sum(other.peer == one.peer for other in queue) for one in queue}
        assert queue.counts == counts
        assert PLACES_COUNT - len(queue) >= PLACES_COUNT / (len(counts) + 1)


def test_the_last_place_is_a_newcomers() -> None:
    queue = FairQueue()
    for number in range(PLACES_COUNT - 1):
        assert join(queue, f"peer {number}")

    assert not join(queue, "peer 0")
    assert join(queue, "newcomer")
    refusal = LIMITS.refusal(ticket("another"), queue)
    assert refusal is not None
    assert refusal.reason is RefusalReason.PLACES
    assert "144 calls wait already, of at most 144, and 0 of them" in refusal.text


def test_bytes_are_shared_as_places_are() -> None:
    queue = FairQueue()

    assert fill(queue, "greedy", 4 * MIB) == 6
    assert fill(queue, "newcomer", 4 * MIB) == 2
    refusal = LIMITS.refusal(ticket("newcomer", 4 * MIB), queue)
    assert refusal is not None
    assert refusal.reason is RefusalReason.BYTES
    assert f"{32 * MIB} bytes already, of at most {48 * MIB}, and {8 * MIB} of them" in refusal.text
    assert join(queue, "greedy"), "what is small is not counted"


def test_a_call_of_any_size_waits_where_no_other_large_one_does() -> None:
    queue = FairQueue()
    fill(queue, "others")

    assert join(queue, "a", 60 * MIB)
    assert not join(queue, "b", MIB)
