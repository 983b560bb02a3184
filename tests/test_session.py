"""A connection's session: its states, and what moves it from one to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deconvd_client
from benchmarks.wire import CountingProxy, count_traffic
from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError, UnavailableError
from deconvd_client import Connection
from deconvd_client.residents.session_thread import SessionThread, SessionThreadState
from tests.deadlines import short_deadline
from tests.processes import wait_until
from tests.servers import only_server, server_process

ONE = np.ones((1, 1, 1, 1), np.float32)


@pytest.fixture
def wire(tmp_path: Path) -> Iterator[CountingProxy]:
    """A way to a server whose sessions outlive their streams by 2 seconds."""
    options = "--session-lease-s", "2"
    with server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as server:
        with count_traffic(server.target) as wire:
            yield wire


@pytest.fixture
def F(wire: CountingProxy) -> Iterator[Connection]:
    with deconvd_client.connect(wire.target, transport="tcp", timeout_s=10) as connection:
        yield connection


def keeper(F: Connection) -> SessionThread:
    return only_server(F).residents._session._thread


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[SessionThreadState]:
    """The states that keepers come to be in, in order."""
    seen: list[SessionThreadState] = []
    move = SessionThread._move

    def recorded(self: SessionThread, to: SessionThreadState, **rest: Any) -> None:
        seen.append(to)
        move(self, to, **rest)

    monkeypatch.setattr(SessionThread, "_move", recorded)
    return seen


def is_in(F: Connection, state: SessionThreadState) -> Callable[[], bool]:
    return lambda: keeper(F).state is state


def test_it_is_opened_by_the_first_need_and_ended_with_its_connection(F: Connection) -> None:
    assert keeper(F).state is SessionThreadState.NONE
    F.put(ONE)
    assert keeper(F).state is SessionThreadState.OPEN
    F.close()
    assert keeper(F).state is SessionThreadState.ENDED
    assert keeper(F).session is None
    with pytest.raises(CallCancelledError):
        F.put(ONE)


def test_a_stream_that_breaks_leaves_it_broken_until_it_is_resumed(
    F: Connection, wire: CountingProxy, states: list[SessionThreadState]
) -> None:
    tensor = F.put(ONE)
    stream = keeper(F)._stream
    wire.cut()
    wait_until(lambda: len(states) >= 3)

    assert states == [SessionThreadState.OPEN, SessionThreadState.BROKEN, SessionThreadState.OPEN]
    assert keeper(F)._stream is not stream
    np.testing.assert_array_equal(tensor.numpy(), ONE)


def test_what_the_server_does_not_know_is_lost_and_the_next_need_opens_another(
    F: Connection, states: list[SessionThreadState]
) -> None:
    F.put(ONE)
    first = keeper(F).session
    assert first is not None
    keeper(F).lose(b"another")
    assert keeper(F).session is first
    keeper(F).lose(first.name)

    assert keeper(F).state is SessionThreadState.LOST
    assert keeper(F).session is None
    F.put(ONE)

    second = keeper(F).session
    assert second is not None
    assert second.name != first.name
    assert states == [
        SessionThreadState.OPEN,
        SessionThreadState.LOST,
        SessionThreadState.NONE,
        SessionThreadState.OPEN,
    ]


def test_a_lost_session_is_left_without_another_need(F: Connection) -> None:
    """At the next sign of life: the server learns that nobody wants it any more."""
    F.put(ONE)
    opened, hold = keeper(F).session, keeper(F)._stream
    assert opened is not None
    assert hold is not None
    keeper(F).lose(opened.name)

    wait_until(is_in(F, SessionThreadState.NONE))

    assert not hold._call.is_active()


def test_it_is_given_up_when_its_lease_has_passed(tmp_path: Path) -> None:
    with server_process(tmp_path, "--session-lease-s", "3", listen=("127.0.0.1:0",)) as server:
        F = deconvd_client.connect(server.target, transport="tcp", timeout_s=2)
        F.put(ONE)
        server.process.kill()
        server.process.wait()

        wait_until(is_in(F, SessionThreadState.BROKEN))
        assert keeper(F).session is not None
        wait_until(is_in(F, SessionThreadState.NONE))

        assert keeper(F).session is None
        with pytest.raises(
            (UnavailableError, DeadlineError)
        ):  # whose thread is first at the deadline
            F.put(ONE)
        assert keeper(F).state is SessionThreadState.NONE
        F.close()


def test_a_session_that_could_not_be_opened_is_none(wire: CountingProxy) -> None:
    with deconvd_client.connect("127.0.0.1:1", timeout_s=1, fail_fast=True) as F:
        with suppress(DeconvdError):
            only_server(F).residents._session.open(short_deadline())
        assert keeper(F).state is SessionThreadState.NONE
        assert keeper(F).session is None
