"""The queue: calls of one peer keep their order, and many calls of one peer do not keep those of others waiting."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from deconvd_server.engine.fair_queue import FairQueue, Ticket


def ticket(peer: str, cost_s: float = 0.0) -> Ticket:
    return Ticket(1, 0, 0, peer, 0.0, threading.Condition(), cost_s)


def queue_of(*tickets: Ticket) -> FairQueue:
    queue = FairQueue()
    for one in tickets:
        queue.add(one)
    return queue


def start_all(queue: FairQueue) -> list[Ticket]:
    """Start the calls, and return them in their order."""
    started: list[Ticket] = []
    while queue:
        started.append(queue[0])
        queue.take_out(queue[0], has_started=True)
    return started


def peers_of(tickets: list[Ticket]) -> str:
    return "".join(one.peer for one in tickets)


def test_calls_of_one_peer_start_in_the_order_in_which_they_came() -> None:
    tickets = [ticket("a", cost_s) for cost_s in (3, 0, 1, 0.5, 2)]

    assert start_all(queue_of(*tickets)) == tickets


def test_peers_whose_calls_cost_the_same_take_turns() -> None:
    queue = queue_of(*(ticket(peer, 1) for peer in "aaaabbc"))

    assert peers_of(start_all(queue)) == "abcabaa"


def test_calls_that_cost_next_to_nothing_take_turns_too() -> None:
    queue = queue_of(*(ticket(peer) for peer in "aaabb"))

    assert peers_of(start_all(queue)) == "ababa"


def test_a_peer_whose_calls_cost_less_has_more_of_them() -> None:
    queue = queue_of(*(ticket("a", 4) for _ in range(3)), *(ticket("b", 1) for _ in range(9)))

    assert peers_of(start_all(queue)) == "abbbbabbbbab"


def test_a_call_that_comes_to_a_flood_is_next_but_for_one() -> None:
    queue = queue_of(*(ticket("a", 1) for _ in range(50)))
    for _ in range(20):
        queue.take_out(queue[0], has_started=True)

    queue.add(ticket("b", 1))

    assert "b" in peers_of(queue[:2])


def test_a_peer_gets_no_credit_for_its_silence() -> None:
    queue = queue_of(*(ticket("a", 1) for _ in range(50)))
    for _ in range(40):
        queue.take_out(queue[0], has_started=True)

    for _ in range(10):
        queue.add(ticket("b", 1))

    assert peers_of(start_all(queue)[:8]).count("a") >= 4


def test_a_call_that_gives_up_costs_its_peer_nothing() -> None:
    queue = queue_of(*(ticket("a", 1) for _ in range(4)), *(ticket("b", 1) for _ in range(3)))
    for given_up in [one for one in queue if one.peer == "b"]:
        queue.take_out(given_up, has_started=False)

    queue.add(ticket("b", 1))

    assert peers_of(start_all(queue)).index("b") < 2


def test_an_empty_queue_remembers_nobody() -> None:
    queue = queue_of(*(ticket("a", 100) for _ in range(9)))
    start_all(queue)

    for peer in "ba":
        queue.add(ticket(peer, 1))
    queue.add(ticket("b", 1))

    assert peers_of(start_all(queue)) == "bab"


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0.01, 1)), min_size=1, max_size=60))
def test_however_calls_come_nobody_is_overtaken_by_more_than_a_fair_part(
    arrivals: list[tuple[str, float]],
) -> None:
    """While a peer has calls that wait, another one gets at most as much as it, but for one call of each."""
    queue = queue_of(*(ticket(peer, cost_s) for peer, cost_s in arrivals))
    left = [peer for peer, _ in arrivals]
    started_s = dict.fromkeys("abcd", 0.0)

    for one in start_all(queue):
        started_s[one.peer] += one.cost_s
        left.remove(one.peer)
        for peer in set(left):
            assert started_s[one.peer] - started_s[peer] <= 2 + 1e-9
