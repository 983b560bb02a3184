"""A connection's session: its states, and what moves it from one to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from benchmarks.wire import Wire, counted
from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError, UnavailableError
from deconvd_client import Connection
from deconvd_client.residents.session_thread import Keeper, SessionState
from tests.deadlines import soon
from tests.processes import wait_until
from tests.servers import server_process

ONE = np.ones((1, 1, 1, 1), np.float32)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[Wire]:
    """A way to a server whose sessions outlive their streams by 2 seconds."""
    options = "--session-lease-s", "2"
    with server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as server:
        with counted(server.target) as wire:
            yield wire


@pytest.fixture
def F(wire: Wire) -> Iterator[Connection]:
    with deconvd_client.connect(wire.target, transport="tcp", timeout_s=10) as connection:
        yield connection


def keeper(F: Connection) -> Keeper:
    return F._server.residents._session._keeper


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[SessionState]:
    """The states that keepers come to be in, in order."""
    seen: list[SessionState] = []
    move = Keeper._move

    def recorded(self: Keeper, to: SessionState, **rest: object) -> None:
        seen.append(to)
        move(self, to, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Keeper, "_move", recorded)
    return seen


def is_in(F: Connection, state: SessionState) -> Callable[[], bool]:
    return lambda: keeper(F).state is state


def test_it_is_opened_by_the_first_need_and_ended_with_its_connection(F: Connection) -> None:
    assert keeper(F).state is SessionState.NONE
    F.put(ONE)
    assert keeper(F).state is SessionState.OPEN
    F.close()
    assert keeper(F).state is SessionState.ENDED
    assert keeper(F).opened is None
    with pytest.raises(CallCancelledError):
        F.put(ONE)


def test_a_stream_that_breaks_leaves_it_broken_until_it_is_resumed(
    F: Connection, wire: Wire, states: list[SessionState]
) -> None:
    tensor = F.put(ONE)
    stream = keeper(F)._hold
    wire.cut()
    wait_until(lambda: len(states) >= 3)

    assert states == [SessionState.OPEN, SessionState.BROKEN, SessionState.OPEN]
    assert keeper(F)._hold is not stream
    np.testing.assert_array_equal(tensor.numpy(), ONE)


def test_what_the_server_does_not_know_is_lost_and_the_next_need_opens_another(
    F: Connection, states: list[SessionState]
) -> None:
    F.put(ONE)
    first = keeper(F).opened
    assert first is not None
    keeper(F).lose(b"another")
    assert keeper(F).opened is first
    keeper(F).lose(first.name)

    assert keeper(F).state is SessionState.LOST
    assert keeper(F).opened is None
    F.put(ONE)

    second = keeper(F).opened
    assert second is not None
    assert second.name != first.name
    assert states == [SessionState.OPEN, SessionState.LOST, SessionState.NONE, SessionState.OPEN]


def test_a_lost_session_is_left_without_another_need(F: Connection) -> None:
    """At the next sign of life: the server learns that nobody wants it any more."""
    F.put(ONE)
    opened, hold = keeper(F).opened, keeper(F)._hold
    assert opened is not None
    assert hold is not None
    keeper(F).lose(opened.name)

    wait_until(is_in(F, SessionState.NONE))

    assert not hold._call.is_active()


def test_it_is_given_up_when_its_lease_has_passed(tmp_path: Path) -> None:
    with server_process(tmp_path, "--session-lease-s", "3", listen=("127.0.0.1:0",)) as server:
        F = deconvd_client.connect(server.target, transport="tcp", timeout_s=2)
        F.put(ONE)
        server.process.kill()
        server.process.wait()

        wait_until(is_in(F, SessionState.BROKEN))
        assert keeper(F).opened is not None
        wait_until(is_in(F, SessionState.NONE))

        assert keeper(F).opened is None
        with pytest.raises(
            (UnavailableError, DeadlineError)
        ):  # whose thread is first at the deadline
            F.put(ONE)
        assert keeper(F).state is SessionState.NONE
        F.close()


def test_a_session_that_could_not_be_opened_is_none(wire: Wire) -> None:
    with deconvd_client.connect("127.0.0.1:1", timeout_s=1, fail_fast=True) as F:
        with suppress(DeconvdError):
            F._server.residents._session.open(soon())
        assert keeper(F).state is SessionState.NONE
        assert keeper(F).opened is None
