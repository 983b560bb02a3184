"""Calls over a long link: how often they wait for an answer before their own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from benchmarks.links.delay_proxy import PROXY_HOST, DelayProxy, long_link
from deconvd.direct.events import Hello
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from deconvd_client.calls.patience import Patience
from deconvd_client.calls.shared_task import SharedTask
from deconvd_client.residents.session_thread import SessionInfo
from tests.direct_calls import get_server_info
from tests.lenders import is_in_shared_memory
from tests.processes import wait_until
from tests.servers import ServerProcess, only_server, server_process

TRANSPORTS = pytest.mark.parametrize("transport", ["auto", "tcp", "grpc"])

X = np.ones((1, 362, 1, 1), np.float32)
ONE = np.ones((1, 1, 1, 1), np.float32)
ROUND_TRIP_S = 0.2
"""Long enough that this machine's own pauses end before the answer."""


def filter_of_512_kb(value: float) -> Array:
    return np.full((362, 362, 1, 1), value, np.float32)


@pytest.fixture(scope="module")
def far_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that has nothing for its own host."""
    directory = tmp_path_factory.mktemp("far")
    options = "--shared-memory-bytes", "0", "--log-level", "debug"
    with server_process(directory, *options, listen=("127.0.0.1:0",)) as running:
        yield running


@pytest.fixture
def link(far_server: ServerProcess) -> Iterator[tuple[str, DelayProxy]]:
    with long_link(far_server.target, ROUND_TRIP_S) as link:
        yield link


def turns_counts(proxy: DelayProxy, grpc_target: str) -> tuple[int, int]:
    """Return how often the sides have taken turns on connections for gRPC, and on direct ones."""
    grpc_port = int(grpc_target.rpartition(":")[2])
    counts = [0, 0]
    for connection in proxy.connections:
        counts[connection.port != grpc_port] += len(connection.turns)
    return counts[0], counts[1]


def wait_until_direct(F: Connection, proxy: DelayProxy, target: str) -> None:
    """Call until a call has gone by a direct connection: all later ones do, one at a time."""

    def is_direct() -> bool:
        _, before = turns_counts(proxy, target)
        F.deconvolution_2d(ONE, ONE)
        # a handshake has two turns, too, but then nothing was direct before
        return before > 0 and turns_counts(proxy, target)[1] == before + 2

    wait_until(is_direct)


@TRANSPORTS
@pytest.mark.parametrize("is_large", [False, True], ids=["small", "large W"])
def test_a_first_call_waits_for_nothing_but_grpcs_own_connection(
    link: tuple[str, DelayProxy], transport: str, is_large: bool
) -> None:
    target, _ = link
    x, W = (X, filter_of_512_kb(1)) if is_large else (ONE, ONE)

    def is_short() -> bool:
        with deconvd_client.connect(target, transport=transport) as F:
            begin_s = time.monotonic()
            y = F.deconvolution_2d(x, W)
            duration_s = time.monotonic() - begin_s
        assert y.shape == x.shape
        # at most one for gRPC's connection, and one for the call; a question before it would take one more
        return duration_s < 2.4 * ROUND_TRIP_S

    wait_until(is_short)  # a busy machine lengthens some calls, but shortens none


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_a_later_call_takes_one_round_trip(link: tuple[str, DelayProxy], transport: str) -> None:
    target, proxy = link
    with deconvd_client.connect(target, transport=transport) as F:
        wait_until_direct(F, proxy, target)
        _, before = turns_counts(proxy, target)

        F.deconvolution_2d(ONE, ONE)

        assert turns_counts(proxy, target)[1] == before + 2


def test_a_new_filter_takes_one_round_trip_and_is_named_from_then_on(
    link: tuple[str, DelayProxy],
) -> None:
    target, proxy = link
    with deconvd_client.connect(target) as F:
        wait_until_direct(F, proxy, target)
        F.put(ONE)  # opens the session, which no other call waits for
        for value in (1.0, 2.0):
            W = filter_of_512_kb(value)
            for is_new in (True, False):
                turns_before = turns_counts(proxy, target)[1]
                bytes_before = sum(connection.sent_bytes for connection in proxy.connections)

                y = F.deconvolution_2d(X, W)

                np.testing.assert_array_equal(y, np.full_like(X, 362 * value))
                assert turns_counts(proxy, target)[1] == turns_before + 2
                sent = sum(connection.sent_bytes for connection in proxy.connections) - bytes_before
                assert (sent > W.nbytes) == is_new


def test_filters_are_sent_while_the_session_is_being_opened(
    link: tuple[str, DelayProxy],
) -> None:
    target, proxy = link
    W = filter_of_512_kb(3)
    with deconvd_client.connect(target, transport="grpc") as F:
        F.deconvolution_2d(X, W)
        wait_until(lambda: only_server(F).residents.has_session)
        F.deconvolution_2d(X, W)  # is remembered
        before = proxy.connections[-1].sent_bytes

        F.deconvolution_2d(X, W)

        assert proxy.connections[-1].sent_bytes - before < W.nbytes / 2


def test_a_server_that_cannot_remember_is_sent_all_filters(
    far_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "deconvd_client.residents.session_thread.SessionInfo",
        lambda name, quota_bytes, _: SessionInfo(name, quota_bytes, can_remember=False),
    )
    W = filter_of_512_kb(4)
    with (
        long_link(far_server.target, 0.0) as (target, proxy),
        deconvd_client.connect(target, transport="grpc") as F,
    ):
        F.put(ONE)
        for _ in range(3):
            np.testing.assert_array_equal(F.deconvolution_2d(X, W), np.full_like(X, 362 * 4))

        assert proxy.connections[-1].sent_bytes > 3 * W.nbytes


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no call wait for what is found out about the server."""
    monkeypatch.setattr("deconvd_client.server._DISCOVERY_PATIENCE_S", 0.0)


@pytest.fixture
def near_server(socket_directory: Path) -> Iterator[ServerProcess]:
    options = "--log-level", "debug"
    with server_process(socket_directory, *options, listen=("127.0.0.1:0", "unix")) as running:
        yield running


@pytest.mark.usefixtures("impatient")
def test_a_near_socket_is_found_beside_calls_and_used_from_then_on(
    near_server: ServerProcess,
) -> None:
    large = np.ones((1, 1, 300, 300), np.float32)
    with deconvd_client.connect(near_server.target) as F:
        F.deconvolution_2d(ONE, ONE)
        route = only_server(F).route
        wait_until(lambda: route.current_stub not in (None, route.target_stub))
        mark = len(near_server.log.read_text())
        F.deconvolution_2d(ONE, ONE)
        assert "Deconvolve from unix:" in near_server.log.read_text()[mark:]
        assert "from ipv4:" not in near_server.log.read_text()[mark:]

        wait_until(lambda: is_in_shared_memory(F.deconvolution_2d(large, ONE)))


@pytest.mark.usefixtures("impatient")
def test_arrays_that_are_asked_for_in_shared_memory_are_there(near_server: ServerProcess) -> None:
    with deconvd_client.connect(near_server.target) as F:
        assert is_in_shared_memory(F.empty((1, 1, 300, 300), np.float32))


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("transport", ["unix", "shared_memory"])
def test_a_pinned_transport_is_waited_for(near_server: ServerProcess, transport: str) -> None:
    large = np.ones((1, 1, 300, 300), np.float32)
    with deconvd_client.connect(near_server.target, transport=transport) as F:
        y = F.deconvolution_2d(large, ONE)

    assert is_in_shared_memory(y) == (transport == "shared_memory")
    log = near_server.log.read_text()
    assert "Deconvolve from unix:" in log or "DeconvolveStream from unix:" in log
    assert "Deconvolve from ipv4:" not in log
    assert "from tcp:" not in log


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_another_program_at_the_direct_port_is_greeted_and_told_nothing(
    far_server: ServerProcess, transport: str
) -> None:
    info = get_server_info(far_server)
    host, _, port = far_server.target.rpartition(":")
    heard: list[bytes] = []
    lines: list[socket.socket] = []

    def listen() -> None:
        with suppress(OSError):  # until the listener is shut down
            while True:
                accepted, _ = listener.accept()
                lines.append(accepted)
                with accepted:
                    while data := accepted.recv(1 << 16):
                        heard.append(data)

    with socket.create_server((PROXY_HOST, info.direct_port)) as listener:
        thread = threading.Thread(target=listen)
        thread.start()
        proxy = DelayProxy(host, [int(port)], 0.0)
        try:
            with deconvd_client.connect(f"{PROXY_HOST}:{port}", transport=transport) as F:
                for _ in range(2):
                    assert F.deconvolution_2d(ONE, ONE).shape == ONE.shape
                wait_until(lambda: bool(heard))
                F.deconvolution_2d(X, filter_of_512_kb(5))
                hello = Hello(bytes.fromhex(info.instance_id)).pack()
                wait_until(lambda: len(b"".join(heard)) >= len(hello))
                listener.shutdown(socket.SHUT_RDWR)
                for line in lines:
                    with suppress(OSError):  # the client has closed it
                        line.shutdown(socket.SHUT_RDWR)
        finally:
            proxy.close()
            thread.join()
    assert b"".join(heard) == hello


class TestPatience:
    """One time for all calls together."""

    def test_begins_when_a_call_first_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now_s = 100.0
        monkeypatch.setattr("time.monotonic", lambda: now_s)
        patience = Patience(2.0)
        now_s = 200.0
        assert patience.remaining_s() == 2.0
        now_s = 201.5
        assert patience.remaining_s() == 0.5
        now_s = 300.0
        assert patience.remaining_s() == 0.0

    def test_has_no_end_by_default(self) -> None:
        assert Patience().remaining_s() > 1e9


class TestSharedTask:
    """Work in the background that several calls wait for."""

    def test_is_under_way_once_however_many_want_it(self) -> None:
        task, begun, may_end = SharedTask(), threading.Event(), threading.Event()
        runs: list[int] = []

        def work() -> None:
            runs.append(1)
            begun.set()
            may_end.wait(60)

        for _ in range(3):
            task.run(work, 0.0)
        assert begun.wait(60)
        task.run(work, 0.01)
        assert runs == [1]

        may_end.set()
        wait_until(lambda: task._end_signal is None)
        task.run(work, 60)
        assert runs == [1, 1]

    def test_all_who_wait_go_on_at_its_end(self) -> None:
        task, may_end = SharedTask(), threading.Event()
        task.run(lambda: may_end.wait(60), 0.0)
        waiting = [
            threading.Thread(target=task.run, args=(lambda: may_end.wait(60), 60)) for _ in range(3)
        ]
        for thread in waiting:
            thread.start()
        may_end.set()
        for thread in waiting:
            thread.join(30)
            assert not thread.is_alive()

    def test_begins_again_in_a_forked_child(self) -> None:
        task, never = SharedTask(), threading.Event()
        task.run(lambda: never.wait(60), 0.0)
        task.reset_after_fork()
        done: list[int] = []
        task.run(lambda: done.append(1), 60)
        never.set()
        assert done == [1]
