"""Admission: what calls keep until their answers have left counts until then, and is shared by peer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from deconvd.errors import ExhaustedError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.load import Load
from deconvd_server.engine.paired_admission import PairedAdmission
from tests.processes import wait_until

MIB = 1 << 20
TIMEOUT_S = 30
IDLE = Load(running_count=0, waiting_count=0, used_bytes=0)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def computed(
    admission: Admission,
    peer: str,
    footprint_bytes: int,
    lasting_bytes: int,
    brought_bytes: int = 0,
) -> CallContext:
    """Return a call that was admitted and computed, and whose answer has not left."""
    call = CallContext(TIMEOUT_S, peer_key=peer)
    with admission.admit(
        footprint_bytes, call, lasting_bytes=lasting_bytes, brought_bytes=brought_bytes
    ):
        pass
    return call


def begun(
    threads: ThreadPoolExecutor,
    admission: Admission,
    peer: str,
    lasting_bytes: int,
    brought_bytes: int = 0,
) -> Future[CallContext]:
    """Begin a call in a thread, and return once it waits or has been computed."""
    count = admission.load.waiting_count
    call = threads.submit(computed, admission, peer, lasting_bytes, lasting_bytes, brought_bytes)
    wait_until(lambda: call.done() or admission.load.waiting_count > count)
    return call


def test_what_a_call_keeps_is_free_at_its_end_and_the_rest_once_it_is_computed() -> None:
    admission = Admission(1, 100 * MIB, 0)

    call = computed(admission, "a", 60 * MIB, 20 * MIB)
    assert admission.load == Load(running_count=0, waiting_count=0, used_bytes=20 * MIB)

    call.end()
    assert admission.load == IDLE


def test_what_is_held_for_a_worker_is_free_once_that_has_ended_too() -> None:
    admission = Admission(1, 100 * MIB, 0)
    call = computed(admission, "a", 60 * MIB, 20 * MIB)
    call.retain()

    call.end()
    assert admission.load.used_bytes == 20 * MIB
    call.end()
    assert admission.load == IDLE


def test_a_call_that_fails_keeps_nothing() -> None:
    admission = Admission(1, 100 * MIB, 0)

    with pytest.raises(KeyError), admission.admit(60 * MIB, CallContext(), lasting_bytes=20 * MIB):
        raise KeyError

    assert admission.load == IDLE


def test_a_call_that_has_ended_already_keeps_nothing() -> None:
    admission, call = Admission(1, 100 * MIB, 0), CallContext()

    with admission.admit(60 * MIB, call, lasting_bytes=20 * MIB):
        call.end()

    assert admission.load == IDLE


def test_a_peer_waits_for_its_own_answers_and_keeps_nobody_else_waiting(
    threads: ThreadPoolExecutor,
) -> None:
    admission = Admission(4, 100 * MIB, 8)
    first, second = (computed(admission, "a", 10 * MIB, 10 * MIB) for _ in range(2))

    third = begun(threads, admission, "a", 10 * MIB)
    assert not third.done()
    begun(threads, admission, "b", 10 * MIB).result(TIMEOUT_S).end()
    computed(
        admission, "a", 10 * MIB, 0
    )  # neither one that keeps nothing, nor one that keeps little
    computed(admission, "a", 10 * MIB, 1000).end()
    assert not third.done()

    first.end()
    third.result(TIMEOUT_S).end()
    second.end()
    assert admission.load == IDLE


def test_answers_that_are_small_are_shared_as_well(threads: ThreadPoolExecutor) -> None:
    admission = Admission(1, 16 * MIB, 8)
    small_bytes = 128 << 10
    kept = [computed(admission, "a", small_bytes, small_bytes) for _ in range(48)]

    next_one = begun(threads, admission, "a", small_bytes)
    assert not next_one.done()
    begun(threads, admission, "b", small_bytes).result(TIMEOUT_S).end()
    assert not next_one.done()

    kept.pop().end()
    kept.append(next_one.result(TIMEOUT_S))
    for call in kept:
        call.end()
    assert admission.load == IDLE


def test_one_answer_may_have_more_than_a_peers_share(threads: ThreadPoolExecutor) -> None:
    admission = Admission(4, 100 * MIB, 8)

    large = computed(admission, "a", 90 * MIB, 90 * MIB)
    next_one = begun(threads, admission, "a", 90 * MIB)
    assert not next_one.done()

    large.end()
    next_one.result(TIMEOUT_S).end()
    assert admission.load == IDLE


def test_a_call_that_lacks_the_bytes_of_answers_keeps_others_waiting_for_a_moment_alone(
    threads: ThreadPoolExecutor,
) -> None:
    admission = Admission(4, 100 * MIB, 8)
    unread = computed(admission, "a", 50 * MIB, 50 * MIB)
    begin_s = time.monotonic()
    large = threads.submit(computed, admission, "b", 60 * MIB, 0)
    wait_until(lambda: admission.load.waiting_count == 1)

    computed(admission, "c", MIB, 0)
    assert time.monotonic() - begin_s >= 2
    assert not large.done()
    begin_s = time.monotonic()
    computed(admission, "c", MIB, 0)
    assert time.monotonic() - begin_s < 1

    unread.end()
    large.result(TIMEOUT_S)
    assert admission.load == IDLE


def test_what_waits_may_have_brought_a_quarter_of_the_budget(threads: ThreadPoolExecutor) -> None:
    admission = Admission(4, 100 * MIB, 8)
    hog = computed(admission, "a", 100 * MIB, 100 * MIB)
    large = begun(threads, admission, "b", 30 * MIB, 30 * MIB)  # one may have more

    with pytest.raises(UnavailableError, match=r"that wait have sent 31457280 bytes already") as e:
        computed(admission, "c", MIB, MIB, MIB)
    assert e.value.retry_after_s
    little = begun(threads, admission, "c", 0)

    hog.end()
    large.result(TIMEOUT_S).end()
    little.result(TIMEOUT_S).end()
    assert admission.load == IDLE


def test_several_may_have_brought_a_quarter_of_the_budget_and_no_more(
    threads: ThreadPoolExecutor,
) -> None:
    admission = Admission(4, 100 * MIB, 8)
    hog = computed(admission, "a", 100 * MIB, 100 * MIB)
    calls = [begun(threads, admission, "b", 24 * MIB, 24 * MIB)]
    calls.append(begun(threads, admission, "c", MIB, MIB))
    with pytest.raises(UnavailableError, match=r"26214400 bytes already, of at most 26214400"):
        computed(admission, "d", MIB, MIB, MIB)

    hog.end()
    for call in calls:
        call.result(TIMEOUT_S).end()
    assert admission.load == IDLE


def test_peers_that_wait_leave_places_in_line_to_others(threads: ThreadPoolExecutor) -> None:
    admission = Admission(4, 100 * MIB, 6)
    hog = computed(admission, "a", 100 * MIB, 100 * MIB)
    waiting = [begun(threads, admission, "b", MIB) for _ in range(3)]

    with pytest.raises(UnavailableError, match=r"3 calls wait already, of at most 6, and 3 of"):
        computed(admission, "b", MIB, MIB)
    waiting += [begun(threads, admission, peer, MIB) for peer in ("c", "d")]
    assert not any(call.done() for call in waiting)
    with pytest.raises(UnavailableError, match=r"5 calls wait already, of at most 6, and 1 of"):
        computed(admission, "c", MIB, MIB)

    hog.end()
    for call in waiting:
        call.result(TIMEOUT_S).end()
    assert admission.load == IDLE


def test_who_is_not_admitted_by_both_is_by_neither() -> None:
    first, second = Admission(1, 100, 0), Admission(1, 10, 0)
    call = CallContext()

    with (
        pytest.raises(ExhaustedError),
        PairedAdmission(first.admit(60, call), second.admit(60, call)),
    ):
        raise AssertionError
    assert first.load == second.load == IDLE

    with PairedAdmission(first.admit(60, call, lasting_bytes=60), second.admit(6, call)):
        assert (first.load.used_bytes, second.load.used_bytes) == (60, 6)
    assert (first.load.used_bytes, second.load) == (60, IDLE)
    call.end()
    assert first.load == IDLE
