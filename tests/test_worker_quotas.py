"""What a tenant may keep on a server of several processes, wherever its clients are."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.errors import ExhaustedError
from deconvd.model.dtypes import Array
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.session_clients import SessionClient, error_of, open_session, remember_stream
from tests.worker_servers import own_targets, pid_of, wait_for_serving

_REQUESTS = "deconvd_server.supervision.room_requests"
_IMAGE_BYTES = 256 << 10
_QUOTA_BYTES = 4 * _IMAGE_BYTES


_SLOW_DROPS = """
import time
from deconvd_server.residents.registry import ResidentRegistry
drop = ResidentRegistry._drop_if_idle
def drop_slowly(registry, entry):
    is_dropped = drop(registry, entry)
    time.sleep(0.02)
    return is_dropped
ResidentRegistry._drop_if_idle = drop_slowly
"""
"""As in a process that has to wait for a processor: another one can take the room that each dropped tensor leaves."""


def image(number: int) -> Array:
    return np.full((1, 1, 256, 256), number, np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of two processes, in which a tenant may keep four images."""
    options = ["--processes", "2", "--tenant-bytes", str(_QUOTA_BYTES)]
    with server_process(tmp_path_factory.mktemp("server"), *options) as running:
        yield running


@contextmanager
def clients(server: ServerProcess, key: bytes, count: int = 2) -> Iterator[list[SessionClient]]:
    """Give clients of one tenant, one of each process."""
    workers = wait_for_serving(server, count)
    with ExitStack() as stack:
        yield [stack.enter_context(open_session(own_targets(worker)[0], key)) for worker in workers]


def three_processes(
    directory: Path, *, prelude: str = "", constants: Mapping[str, float] | None = None
) -> AbstractContextManager[ServerProcess]:
    """Run a server of three processes, in which a tenant may keep four images."""
    options = ["--processes", "3", "--tenant-bytes", str(_QUOTA_BYTES)]
    return server_process(directory, *options, prelude=prelude, constants=constants)


def remember(held: SessionClient, seed: int) -> None:
    """Have a process keep a W of a quarter of the quota, which could be sent again."""
    W = np.random.default_rng(seed).standard_normal((1, 1, 256, 256), np.float32)
    x = np.ones((1, 1, 1, 1), np.float32)
    list(held.stub.DeconvolveStream(remember_stream(held.session, x, W)))


def test_a_tenant_keeps_no_more_in_all_processes_than_in_one(server: ServerProcess) -> None:
    with clients(server, b"shared") as (first, second):
        assert first.opened.quota_bytes == second.opened.quota_bytes == _QUOTA_BYTES
        kept = [first.put(image(number)) for number in range(3)]
        second.put(image(3))
        for full in (first, second):
            with pytest.raises(grpc.RpcError, match=f"this one keeps {_QUOTA_BYTES}") as failure:
                full.put(image(4))
            assert isinstance(error_of(failure), ExhaustedError)
        with open_session(own_targets(wait_for_serving(server)[1])[0]) as stranger:
            stranger.put(image(5))
        first.drop(kept.pop())
        second.put(image(6))

        for number, handle in enumerate(kept):
            np.testing.assert_array_equal(first.get(handle), image(number))


def test_one_client_may_have_all_of_it(server: ServerProcess) -> None:
    with clients(server, b"alone") as (first, second):
        for number in range(4):
            second.put(image(number))
        assert second.resident_count() == 4
        second.close()
        for number in range(4):  # now that the other one has left
            first.put(image(number))


def test_what_can_be_sent_again_gives_way_to_what_another_process_keeps(
    server: ServerProcess,
) -> None:
    with clients(server, b"greedy") as (first, second):
        for seed in range(4):
            remember(first, seed)
        assert first.resident_count() == 4
        second.put(image(0))
        second.put(image(1))
        assert first.resident_count() == 2
        remember(second, 9)
        assert (first.resident_count(), second.resident_count()) == (1, 3)


def test_no_more_gives_way_than_another_process_needs(tmp_path: Path) -> None:
    options = ["--processes", "2", "--tenant-bytes", str(_QUOTA_BYTES)]
    with (
        server_process(tmp_path, *options, prelude=_SLOW_DROPS) as server,
        clients(server, b"slow") as (first, second),
    ):
        for seed in range(4):
            remember(first, seed)
        second.put(image(0))

        assert first.resident_count() == 3


def test_no_more_gives_way_of_several_others_than_another_process_needs(tmp_path: Path) -> None:
    # as on a machine on which each takes long: none is asked before the one before it has answered
    patience = {f"{_REQUESTS}:_TURN_S": 30.0, f"{_REQUESTS}:_PATIENCE_S": 30.0}
    with (
        three_processes(tmp_path, prelude=_SLOW_DROPS, constants=patience) as server,
        clients(server, b"slow", 3) as (first, second, third),
    ):
        for seed in range(4):
            remember((first, second)[seed % 2], seed)
        third.put(image(0))

        assert first.resident_count() + second.resident_count() == 3


def test_who_wants_no_room_any_more_gets_none(tmp_path: Path) -> None:
    with (
        three_processes(tmp_path) as server,
        clients(server, b"late", 3) as (first, second, third),
    ):
        for seed in range(3):
            remember(first, seed)
        second.put(image(0))
        pid = pid_of(server, "0")
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(grpc.RpcError, match="over its quota"):
                third.put(image(1))
        finally:
            os.kill(pid, signal.SIGCONT)
        # its requests are served in turn, so the one that nobody waits for has been when another one is
        with clients(server, b"later", 3) as (early, _, late):
            for seed in range(4):
                remember(early, seed)
            late.put(image(2))

        assert first.resident_count() == 3


def test_nobody_waits_for_a_process_that_has_ended(tmp_path: Path) -> None:
    patience = {f"{_REQUESTS}:_TURN_S": 600.0, f"{_REQUESTS}:_PATIENCE_S": 600.0}
    with (
        three_processes(tmp_path, constants=patience) as server,
        clients(server, b"mourned", 3) as (first, second, third),
    ):
        for number in range(3):
            first.put(image(number))
        second.put(image(3))
        pid = pid_of(server, "0")
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor() as threads:
            waiting = threads.submit(third.put, np.ones((1, 1, 512, 512), np.float32))
            time.sleep(0.5)  # for it to ask the process that is stopped, which has most
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(
                grpc.RpcError, match="over its quota"
            ):  # as the second one keeps its own
                waiting.result(60)


def test_a_process_that_ends_gives_back_what_a_tenant_had_there(server: ServerProcess) -> None:
    with clients(server, b"bereft") as (first, second):
        for number in range(4):
            first.put(image(number))
        with pytest.raises(grpc.RpcError, match="over its quota"):
            second.put(image(4))
        os.kill(pid_of(server, "0"), signal.SIGKILL)
        wait_until(lambda: "worker 0 (cpu) was ended by SIGKILL" in server.log.read_text())
        wait_for_serving(server)
        for number in range(4):
            second.put(image(number))


def test_a_process_that_is_stopped_makes_others_wait_but_not_for_long(
    tmp_path: Path,
) -> None:
    options = ["--processes", "2", "--tenant-bytes", str(_QUOTA_BYTES)]
    with server_process(tmp_path, *options) as server, clients(server, b"shared") as (one, other):
        for number in range(4):
            one.put(image(number))
        pid = pid_of(server, "0")
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(grpc.RpcError, match="over its quota"):
                other.put(image(4))
        finally:
            os.kill(pid, signal.SIGCONT)
        assert "other processes do not say" in server.log.read_text()


def test_our_clients_of_one_tenant_share_its_quota(server: ServerProcess) -> None:
    with (
        deconvd_client.connect(server.target, tenant_key="ours") as one,
        deconvd_client.connect(server.target, tenant_key="ours") as other,
    ):
        kept = [F.put(image(0)) for F in (one, other, one, other)]
        for F in (one, other):
            with pytest.raises(deconvd_client.ExhaustedError, match="over its quota"):
                F.put(image(1))
        kept.pop().close()  # of the second client, which tells its process when it calls next
        other.put(image(1))
