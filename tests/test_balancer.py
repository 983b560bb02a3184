"""Which of several servers gets a call: decided by W, residents and load, and only among those that serve."""

from __future__ import annotations

from collections import Counter

import pytest

from deconvd.errors import InternalError, UnavailableError
from deconvd_client.calls.cancel_scope import CancelScope
from deconvd_client.calls.deadline import Deadline
from deconvd_client.server_set import balancer as module
from deconvd_client.server_set.balancer import (
    Balancer,
    Member,
    MemberState,
    Preference,
    RunningAttempt,
)

SERVING, OUT = MemberState.SERVING, MemberState.OUT
GONE = UnavailableError("nobody listens")
KEYS = [f"W{number}".encode() for number in range(3000)]


def make_balancer(count: int = 3) -> tuple[Balancer[str], list[Member[str]]]:
    balancer: Balancer[str] = Balancer()
    members = [Member(f"host-{number}:1".encode(), f"server {number}") for number in range(count)]
    for member in members:
        balancer.add(member)
    return balancer, members


def begin(
    balancer: Balancer[str],
    preference: Preference[str] | None = None,
    vain: tuple[Member[str], ...] = (),
    size_bytes: int = 0,
) -> Member[str]:
    attempt = RunningAttempt(CancelScope(), size_bytes, 1.0)
    member = balancer.begin(preference or Preference(), attempt, vain)
    assert member is not None
    return member


def choose(
    balancer: Balancer[str],
    preference: Preference[str] | None = None,
    vain: tuple[Member[str], ...] = (),
) -> Member[str] | None:
    """Return where a call would go that ends at once."""
    attempt = RunningAttempt(CancelScope(), 0, 1.0)
    member = balancer.begin(preference or Preference(), attempt, vain)
    if member is not None:
        balancer.end(member, attempt)
    return member


def states(balancer: Balancer[str]) -> list[MemberState]:
    return [member.state for member in balancer.members]


def places(balancer: Balancer[str]) -> dict[bytes, Member[str] | None]:
    return {key: choose(balancer, Preference(key)) for key in KEYS}


def test_every_member_has_its_share_of_keys_and_all_clients_agree() -> None:
    balancer, members = make_balancer()
    other, _ = make_balancer()

    found = places(balancer)

    counts = Counter(found.values())
    assert all(800 < counts[member] < 1200 for member in members)
    elsewhere = {key: member and member.identity for key, member in places(other).items()}
    assert elsewhere == {key: member and member.identity for key, member in found.items()}


def test_only_the_keys_of_a_lost_member_move() -> None:
    balancer, (lost, *_) = make_balancer()
    before = places(balancer)

    balancer.note_failure(lost, GONE)
    meanwhile = places(balancer)
    balancer.note_health(lost)

    assert all(meanwhile[key] is before[key] for key in KEYS if before[key] is not lost)
    moved = Counter(meanwhile[key] for key in KEYS if before[key] is lost)
    assert len(moved) == 2
    assert min(moved.values()) > 300  # to both of the others
    assert places(balancer) == before


def test_the_parts_of_a_call_go_to_different_members() -> None:
    balancer, _ = make_balancer()

    for key in KEYS[:50]:
        assert len({choose(balancer, Preference(key, turn)) for turn in range(3)}) == 3


def test_calls_without_a_key_go_where_least_is_under_way() -> None:
    balancer, members = make_balancer()

    large = begin(balancer, size_bytes=1 << 30)

    others = [begin(balancer) for _ in range(6)]
    assert Counter(others) == {member: 3 for member in members if member is not large}


def test_calls_go_where_they_do_not_queue() -> None:
    balancer, (full, *others) = make_balancer()

    balancer.note_answer(full, queue_s=1.0)
    for member in others:
        balancer.note_answer(member, queue_s=0.0)

    assert {choose(balancer) for _ in range(20)} == set(others)


def test_a_call_leaves_its_member_if_that_has_far_too_much_to_do() -> None:
    balancer, members = make_balancer()
    preference: Preference[str] = Preference(b"W")
    home = begin(balancer, preference)

    served = Counter(begin(balancer, preference) for _ in range(300))

    assert served[home] > 100  # more than the others, which get W only then
    assert all(served[member] > 50 for member in members)


def test_a_member_that_refuses_comes_last_for_as_long_as_it_said() -> None:
    balancer, members = make_balancer()
    full, *others = members

    balancer.note_refusal(full, pause_s=60.0)

    assert {choose(balancer) for _ in range(20)} == set(others)
    assert choose(balancer, vain=tuple(others)) is full
    balancer.note_refusal(full, pause_s=0.0)
    assert full in {choose(balancer) for _ in range(50)}


def test_nobody_is_chosen_twice_and_nobody_who_is_out() -> None:
    balancer, (first, second, third) = make_balancer()
    balancer.note_failure(first, GONE)

    assert choose(balancer, vain=(second,)) is third
    assert choose(balancer, vain=(second, third)) is None
    assert first.error is GONE


def test_residents_decide_before_keys_and_load() -> None:
    balancer, (first, second, _) = make_balancer()
    preference = Preference(b"W", holders=(second, first))

    assert choose(balancer, preference) is second
    assert choose(balancer, preference, (second,)) is first
    balancer.note_failure(second, GONE)
    assert choose(balancer, preference) is first


def test_a_call_with_a_result_that_only_one_member_has_goes_nowhere_else() -> None:
    balancer, (first, second, _) = make_balancer()
    preference = Preference(holders=(second, first), is_bound=True)

    assert choose(balancer, preference) is second
    assert choose(balancer, preference, (second,)) is None
    balancer.retire(second)
    assert choose(balancer, preference) is second  # also if it is no longer configured
    balancer.add(second)
    balancer.note_failure(second, GONE)
    assert choose(balancer, preference) is None


def test_a_silent_member_loses_its_calls_unless_it_is_the_last() -> None:
    balancer, (first, second) = make_balancer(2)
    attempt = RunningAttempt(CancelScope(), 0, 1.0)
    balancer.begin(Preference(holders=(first,)), attempt, ())

    assert balancer.note_silence(first, GONE) == [attempt]
    assert attempt.is_given_up
    assert balancer.note_silence(second, GONE) == []
    assert states(balancer) == [OUT, SERVING]


def test_faults_in_succession_take_a_member_out_but_never_half_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_OUTLIER_PAUSE_S", 20.0)
    balancer, (first, second, _) = make_balancer()

    for _ in range(2):
        balancer.note_fault(first, InternalError("oops"))
    balancer.note_answer(first, 0.0)
    for _ in range(2):
        balancer.note_fault(first, InternalError("oops"))
    assert states(balancer) == [SERVING, SERVING, SERVING]  # not in succession

    balancer.note_fault(first, InternalError("oops"))
    assert states(balancer) == [OUT, SERVING, SERVING]
    assert 15 < first.next_probe_s <= 20
    for _ in range(5):
        balancer.note_fault(second, InternalError("oops"))
    assert states(balancer) == [OUT, SERVING, SERVING]

    balancer.note_health(first)
    balancer.note_fault(first, InternalError("oops"))  # it is on probation
    assert states(balancer) == [OUT, SERVING, SERVING]
    assert 35 < first.next_probe_s <= 40


def test_pauses_between_probes_grow() -> None:
    balancer, (first, *_) = make_balancer()
    pauses = []
    for _ in range(7):
        balancer.note_failure(first, GONE)
        pauses.append(first.next_probe_s)

    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0], abs=0.05)


def test_it_serves_as_long_as_one_member_does_that_is_no_spare() -> None:
    balancer, (first, second) = make_balancer(2)
    balancer.add(Member(b"entry", "entry", is_spare=True))
    assert balancer.has_serving()
    balancer.note_failure(first, GONE)
    assert balancer.has_serving()
    balancer.note_failure(second, GONE)
    assert not balancer.has_serving()


def test_calls_of_both_kinds_count_as_running() -> None:
    balancer, (first,) = make_balancer(1)
    begin(balancer)
    first.quick_calls.add(Deadline(60))

    assert first.running_count == 2
