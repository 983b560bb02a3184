"""Admission: calls that would wait for too long are refused when they come, and told when to come back."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from deconvd.errors import CallCancelledError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.engine import admission as admission_module
from deconvd_server.engine import place_clock, queue_limits, workload
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.load import Load
from deconvd_server.engine.queue_limits import RefusalReason, WaitLimit
from tests.clocks import StandingClock, stop_clock
from tests.processes import wait_until

TIMEOUT_S = 30
KIND = 7
"""The footprint of all calls here."""

ALONE_S = 0.02
IDLE = Load(running_count=0, waiting_count=0, used_bytes=0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StandingClock:
    return stop_clock(monkeypatch, admission_module, place_clock, queue_limits, workload)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def taught(
    clock: StandingClock, places_count: int = 2, limit: WaitLimit | None = None
) -> Admission:
    """Return an admission that knows how long a call takes, and that was idle for long."""
    admission = Admission(places_count, 1000, 90, wait_limit=limit or WaitLimit())
    with admission.admit(KIND, CallContext()):
        clock.now_s += ALONE_S
    clock.now_s += 100
    return admission


def admitted(admission: Admission, peer: str = "a") -> AbstractContextManager[None]:
    return admission.admit(KIND, CallContext(TIMEOUT_S, peer_key=peer))


def waiting(threads: ThreadPoolExecutor, admission: Admission, call: CallContext) -> Future[None]:
    """Return a call that waits, and leaves as soon as it has come in."""
    count = admission.load.waiting_count

    def come_and_go() -> None:
        with admission.admit(KIND, call):
            pass

    future = threads.submit(come_and_go)
    wait_until(lambda: admission.load.waiting_count > count)
    return future


def test_a_third_call_waits_and_a_fourth_is_refused_and_told_when_to_come_back(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission = taught(clock)
    with admitted(admission), admitted(admission):
        third = waiting(threads, admission, CallContext(TIMEOUT_S, peer_key="a"))
        with pytest.raises(UnavailableError) as raised, admitted(admission):
            pass

    third.result(TIMEOUT_S)
    assert str(raised.value) == (
        "the server is full: the call would wait for 0.06 s, and may wait for 0.044 s"
    )
    assert raised.value.retry_after_s == pytest.approx(0.016)
    assert admission.load.refused_counts[RefusalReason.TIME] == 1
    assert admission.load == IDLE


def test_a_call_is_refused_though_a_place_is_free(clock: StandingClock) -> None:
    admission = taught(clock, places_count=8)

    with admitted(admission), admitted(admission), admitted(admission):
        with pytest.raises(UnavailableError, match=r"would wait for 0\.06 s"), admitted(admission):
            pass
        assert admission.load.running_count == 3


def test_a_call_that_is_let_in_already_is_not_refused(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission, stream = taught(clock), CallContext(TIMEOUT_S, peer_key="a")
    stream.is_accepted = True
    with admitted(admission), admitted(admission):
        slices = [waiting(threads, admission, stream) for _ in range(5)]

    for one in slices:
        one.result(TIMEOUT_S)
    assert admission.load == IDLE


def test_a_call_that_gives_up_in_the_queue_makes_room(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission, call = taught(clock), CallContext(TIMEOUT_S, peer_key="a")
    with admitted(admission), admitted(admission):
        third = waiting(threads, admission, call)
        call.cancel()
        with pytest.raises(CallCancelledError):
            third.result(TIMEOUT_S)
        waiting(threads, admission, CallContext(TIMEOUT_S, peer_key="a"))


def test_a_call_that_leaves_and_enters_again_counts_once(clock: StandingClock) -> None:
    admission = taught(clock)
    again = admitted(admission)

    for _ in range(3):
        with again:
            clock.now_s += ALONE_S
    clock.now_s += 100
    with admitted(admission), admitted(admission), admitted(taught(clock)):
        pass

    assert admission.load == IDLE


def test_small_calls_are_never_refused_for_want_of_time(clock: StandingClock) -> None:
    admission = taught(clock, places_count=90)
    with admission.admit(1, CallContext(TIMEOUT_S, peer_key="a")):
        pass

    with admitted(admission), admitted(admission), admitted(admission):
        for _ in range(50):
            admission.admit(1, CallContext(TIMEOUT_S, peer_key="a")).__enter__()
    assert admission.load.refused_counts[RefusalReason.TIME] == 0


def test_the_operators_limit_counts_for_all(clock: StandingClock) -> None:
    admission = taught(clock, places_count=90, limit=WaitLimit(ALONE_S * 9))
    scopes = [admitted(admission) for _ in range(10)]
    for scope in scopes:
        scope.__enter__()

    with pytest.raises(UnavailableError, match=r"wait for 0\.2 s, and may wait for 0\.18 s"):
        admitted(admission).__enter__()


def test_a_full_queue_tells_how_long_it_takes(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission = Admission(2, 1000, 6, wait_limit=WaitLimit(1000))
    with admitted(admission):
        clock.now_s += ALONE_S
    assert admission.load.wait_s == 0

    with admitted(admission), admitted(admission):
        waiters = [
            waiting(threads, admission, CallContext(TIMEOUT_S, peer_key="a")) for _ in range(3)
        ]
        assert admission.load.wait_s == pytest.approx(4 * ALONE_S / 2)
        with pytest.raises(UnavailableError, match="3 calls wait already") as raised:
            admitted(admission).__enter__()

    assert raised.value.retry_after_s == pytest.approx(4 * ALONE_S / 2)
    assert admission.load.refused_counts[RefusalReason.PLACES] == 1
    for waiter in waiters:
        waiter.result(TIMEOUT_S)


def test_calls_of_other_peers_start_before_those_of_a_flood(
    clock: StandingClock, threads: ThreadPoolExecutor
) -> None:
    admission = taught(clock, places_count=1, limit=WaitLimit(1000))
    order: list[str] = []

    def come(peer: str) -> None:
        with admitted(admission, peer):
            order.append(peer)

    with admitted(admission, "flood"):
        futures = []
        for peer in ["flood"] * 6 + ["b", "c", "b"]:
            futures.append(threads.submit(come, peer))
            wait_until(lambda: admission.load.waiting_count == len(futures))

    for future in futures:
        future.result(TIMEOUT_S)
    assert set(order[:3]) == {"flood", "b", "c"}
    assert "b" in order[3:5]
