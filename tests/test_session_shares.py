"""Sessions among peers: nobody shuts others out, and who had to give way loses nothing but time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.errors import LostSessionError, UnavailableError
from deconvd.wire.grpc_status import error_from_rpc
from deconvd_client import Connection
from deconvd_server.daemon import Daemon
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.residents import ResidentLimits, SessionLimits, Sessions
from deconvd_server.settings import Settings
from tests.processes import memory_bytes, wait_until
from tests.servers import only_server, server_process
from tests.session_clients import SessionClient, error_of, open_session

MIB = 1 << 20
ONE = np.ones((1, 1, 1, 1), np.float32)
RESERVED_COUNT = 16


def open_many(target: str, count: int, stack: ExitStack) -> list[SessionClient]:
    return [stack.enter_context(open_session(target)) for _ in range(count)]


def test_one_peers_sessions_shut_no_other_peer_out(socket_directory: Path) -> None:
    listen = "unix", "127.0.0.1:0"
    with server_process(socket_directory, listen=listen) as server, ExitStack() as stack:
        # all that come by Unix sockets are one peer
        greedy = open_many(server.targets[0], 256 - RESERVED_COUNT, stack)
        for each in greedy[:8]:
            each.put(ONE)
        one_more = stack.enter_context(open_session(server.targets[0]))
        one_more.put(ONE)
        assert [each for each in greedy if is_lost(each)] == greedy[
            8:9
        ]  # the oldest without tensors

        modest = [
            stack.enter_context(open_session(server.targets[1])) for _ in range(2 * RESERVED_COUNT)
        ]

        for each in modest:
            np.testing.assert_array_equal(each.get(each.put(ONE)), ONE)
        for each in greedy[:8]:  # those that hold something stay while there are others
            each.put(ONE)
        # the first of the others has its place of the reserve, and the oldest of all give way to the rest
        assert [each for each in greedy if is_lost(each)] == greedy[8 : 8 + len(modest)]


def is_lost(held: SessionClient) -> bool:
    try:
        held.drop(b"unknown")
    except grpc.RpcError as error:
        return isinstance(error_from_rpc(error), LostSessionError)
    return False


@pytest.fixture
def daemon(socket_directory: Path) -> Iterator[Daemon]:
    """A server that takes three sessions."""
    limits = ResidentLimits(sessions_count=3)
    addresses = ["127.0.0.1:0", f"unix:{socket_directory}/deconvd.sock"]
    daemon = Daemon(Settings(addresses, 4 * MIB, drain_timeout_s=10, residents=limits))
    daemon.serve(lambda: [CpuDevice(1)])
    try:
        yield daemon
    finally:
        daemon.drain()


def connection(target: str) -> Connection:
    return deconvd_client.connect(target, transport="tcp")


def test_a_client_whose_session_gave_way_keeps_its_tensors_in_another(daemon: Daemon) -> None:
    target, others_target = daemon.addresses
    with ExitStack() as stack:
        clients = [stack.enter_context(connection(target)) for _ in range(3)]
        x = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
        tensors = [client.put(x) for client in clients]
        keeper = only_server(clients[0]).residents._session._thread

        with open_session(others_target) as other:
            other.put(ONE)
            with pytest.raises(grpc.RpcError, match="no place for more sessions") as failure:
                SessionClient(other.channel)
            assert isinstance(error_of(failure), UnavailableError)
            assert error_of(failure).retry_after_s
            wait_until(lambda: keeper.session is None)  # it was told
            np.testing.assert_array_equal(clients[1].deconvolution_2d(tensors[1], ONE), x)
            with ThreadPoolExecutor(1) as pool:
                y = pool.submit(clients[0].deconvolution_2d, tensors[0], ONE)
                with pytest.raises(TimeoutError):
                    y.result(1)  # there is no place for it
                other.close()
                np.testing.assert_array_equal(y.result(30), x)
        np.testing.assert_array_equal(tensors[0].numpy(), x)


def test_what_gives_way_is_cleared_by_another_thread() -> None:
    ended: list[tuple[object, threading.Thread]] = []
    sessions = Sessions(
        SessionLimits(2, 30, 1 << 30),
        lambda session, _: ended.append((session, threading.current_thread())),
    )
    hung_up = threading.Event()
    first = sessions.open(b"", hung_up.set, "a")
    sessions.open(b"", hung_up.set, "a")

    sessions.open(b"", lambda: None, "b")

    with pytest.raises(LostSessionError):
        sessions.get(first.name)
    assert not ended
    assert not hung_up.is_set()
    sessions.wait_until_due(30)
    sessions.expire()
    assert [session for session, _ in ended] == [first]
    assert hung_up.is_set()
    assert sessions.count == 2


def test_a_session_takes_little(socket_directory: Path) -> None:
    with server_process(socket_directory) as server:
        with open_session(server.target):
            pass
        before_bytes = memory_bytes(server.process.pid)
        with grpc.insecure_channel(server.target) as channel:
            held = [SessionClient(channel) for _ in range(200)]
            grown_bytes = memory_bytes(server.process.pid) - before_bytes
            for each in held:
                each.cancel()
        assert grown_bytes < 200 * 64 * 1024
