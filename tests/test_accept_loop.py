"""The loop that accepts connections: what it takes, what it passes over, and what is left when it ends."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from deconvd_server.resources import accept_loop as listener_module
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.resources.unix_listener import SideSocket, SocketPurpose
from tests.processes import leaves_no_descriptor, wait_until

TIMEOUT_S = 30


class Taker:
    """Takes connections, as long as `error` is None."""

    def __init__(self) -> None:
        self.taken = SimpleQueue[socket.socket]()
        self.error: Exception | None = None

    def take(self, connection: socket.socket, _address: Any) -> None:
        if self.error is not None:
            raise self.error
        self.taken.put(connection)

    def next(self) -> socket.socket:
        return self.taken.get(timeout=TIMEOUT_S)


def listening() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    return listener


@contextmanager
def run(
    taker: Taker,
    *sockets: socket.socket,
    sides: Sequence[SideSocket] = (),
    lost: list[str] | None = None,
) -> Iterator[Listener]:
    on_lost = pytest.fail if lost is None else lost.append
    listener = Listener("those of the test", sides, sockets, taker.take, on_lost)
    thread = threading.Thread(target=listener.run)
    thread.start()
    try:
        yield listener
    finally:
        listener.stop()
        thread.join(TIMEOUT_S)
        listener.close()


def test_what_is_due_later_is_done_in_its_order_and_not_before() -> None:
    done = SimpleQueue[tuple[str, float]]()
    began_s = time.monotonic()

    def note(name: str) -> None:
        done.put((name, time.monotonic() - began_s))

    with run(Taker()) as listener:
        for delay_s, name in ((0.1, "last"), (0.05, "first"), (0.05, "second")):
            listener.call_soon(partial(listener.call_later, delay_s, partial(note, name)))
        names, times_s = zip(*(done.get(timeout=TIMEOUT_S) for _ in range(3)), strict=True)

    assert names == ("first", "second", "last")
    assert times_s[0] >= 0.05
    assert times_s[2] >= 0.1


def test_every_socket_is_listened_on_until_it_is_withdrawn() -> None:
    taker = Taker()
    sockets = listening(), listening()
    addresses = [one.getsockname() for one in sockets]
    with run(taker, *sockets) as listener:
        for address in addresses:
            with socket.create_connection(address, TIMEOUT_S), taker.next():
                pass
        listener.withdraw()
        wait_until(lambda: all(one.fileno() < 0 for one in sockets))
        for address in addresses:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address, TIMEOUT_S)


def test_who_cannot_be_taken_is_let_go_and_the_next_is_taken_once_it_can_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    taker = Taker()
    taker.error = RuntimeError("can't start new thread")
    sock = listening()
    address = sock.getsockname()
    with run(taker, sock):
        for _ in range(3):
            with socket.create_connection(address, TIMEOUT_S) as refused:
                assert refused.recv(1) == b""
        taker.error = None
        with socket.create_connection(address, TIMEOUT_S), taker.next():
            pass
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "those of the test are not accepted for now: can't start new thread" in caplog.text


@contextmanager
def traffic(listener: Listener) -> Iterator[None]:
    """Have something come all the time for the block."""
    ours, theirs = socket.socketpair()
    theirs.send(b"always there to be read")
    with ours, theirs:
        listener.call_soon(lambda: listener.watch(ours.fileno(), lambda: None))
        try:
            yield
        finally:
            done = threading.Event()
            listener.call_soon(lambda: listener.unwatch(ours.fileno()))
            listener.call_soon(done.set)
            assert done.wait(TIMEOUT_S)


def test_traffic_does_not_keep_it_from_taking_connections_again() -> None:
    taker = Taker()
    taker.error = OSError("Too many open files")
    sock = listening()
    address = sock.getsockname()
    with run(taker, sock) as listener, traffic(listener):
        with socket.create_connection(address, TIMEOUT_S) as refused:
            assert refused.recv(1) == b""
        taker.error = None
        with socket.create_connection(address, TIMEOUT_S), taker.next():
            pass


def test_traffic_does_not_keep_it_from_making_a_file_anew(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "_RESTORE_PERIOD_S", 0.1)
    path = socket_directory / "calls"
    side = SideSocket(path, kind=SocketPurpose.CALLS.kind)
    with run(Taker(), sides=[side]) as listener, traffic(listener):
        path.unlink()
        wait_until(path.exists)
        listener.withdraw()


def test_an_error_that_nobody_foresaw_is_logged_and_told(caplog: pytest.LogCaptureFixture) -> None:
    taker = Taker()
    taker.error = ValueError("on purpose")
    lost: list[str] = []
    sock = listening()
    with run(taker, sock, lost=lost), socket.create_connection(sock.getsockname(), TIMEOUT_S):
        wait_until(lambda: bool(lost))
    assert lost == ["the thread for those of the test"]
    assert "those of the test are no longer served: unforeseen error" in caplog.text
    assert "on purpose" in caplog.text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_shortage_that_one_connection_meets_ends_nothing(error: Exception) -> None:
    taker = Taker()
    taker.error = error
    sock = listening()
    address = sock.getsockname()
    with run(taker, sock):
        with socket.create_connection(address, TIMEOUT_S) as refused:
            assert refused.recv(1) == b""
        taker.error = None
        with socket.create_connection(address, TIMEOUT_S), taker.next():
            pass


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")])
def test_what_met_a_shortage_is_done_again_and_delays_nothing_else(error: Exception) -> None:
    done = SimpleQueue[str]()
    luck = iter([error, error, None])

    def act_with_luck() -> None:
        if (missing := next(luck)) is not None:
            raise missing
        done.put("first")

    with run(Taker()) as listener:
        listener.call_soon(act_with_luck)
        listener.call_soon(lambda: done.put("second"))
        assert [done.get(timeout=TIMEOUT_S) for _ in range(2)] == ["second", "first"]


def test_the_loop_ends_although_what_came_before_meets_a_shortage_that_lasts() -> None:
    is_short = True

    def act() -> None:
        if is_short:
            raise OSError(errno.ENOSPC, "No space left on device")

    listener = Listener("those of the test", (), (), Taker().take, pytest.fail)
    thread = threading.Thread(target=listener.run, daemon=True)
    thread.start()
    listener.call_soon(act)
    listener.stop()
    thread.join(TIMEOUT_S)
    has_ended, is_short = not thread.is_alive(), False
    thread.join()
    listener.close()
    assert has_ended


def test_an_error_of_a_system_call_that_is_no_shortage_ends_the_loop() -> None:
    def fail() -> None:
        raise OSError(errno.EBADF, "on purpose")

    lost: list[str] = []
    with run(Taker(), lost=lost) as listener:
        listener.call_soon(fail)
        wait_until(lambda: bool(lost))


def test_what_is_watched_is_acted_on_until_it_is_not() -> None:
    heard = SimpleQueue[bytes]()
    ours, theirs = socket.socketpair()
    with ours, theirs, run(Taker()) as listener:

        def hear() -> None:
            heard.put(data := ours.recv(1))
            if data == b"2":
                listener.unwatch(ours.fileno())

        listener.call_soon(lambda: listener.watch(ours.fileno(), hear))
        theirs.send(b"123")
        assert [heard.get(timeout=TIMEOUT_S) for _ in range(2)] == [b"1", b"2"]
        listener.call_soon(lambda: heard.put(b"soon"))
        assert heard.get(timeout=TIMEOUT_S) == b"soon"


def test_a_descriptor_that_its_owner_has_closed_stops_nothing() -> None:
    taker = Taker()
    sock = listening()
    address = sock.getsockname()
    watched = threading.Event()
    with run(taker, sock) as listener:
        ours, theirs = socket.socketpair()
        descriptor = ours.fileno()
        listener.call_soon(lambda: listener.watch(descriptor, lambda: None))
        listener.call_soon(watched.set)
        assert watched.wait(TIMEOUT_S)
        ours.close()
        theirs.close()
        listener.call_soon(lambda: listener.unwatch(descriptor))
        with socket.create_connection(address, TIMEOUT_S), taker.next():
            pass


def test_what_comes_too_late_for_the_loop_is_done_when_it_is_closed() -> None:
    done: list[str] = []
    with leaves_no_descriptor():
        with run(Taker(), listening()) as listener:
            listener.stop()
            listener.call_soon(lambda: done.append("late"))
        assert done == ["late"]
        listener.close()
