"""Several real servers behind one name, each of several processes: all of them are used, and what one's end costs."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deconvd_client
from deconvd.errors import LostTensorError, UnavailableError
from deconvd_client import Connection, RemoteTensor
from deconvd_client.server_set.server_set import ServerSet
from deconvd_client.workers.host import Host
from tests.fleets import FILTERS, LARGE, TWO, X, checked, repeat_calls
from tests.processes import wait_until
from tests.servers import free_port
from tests.worker_hosts import WorkerHost, running_host
from tests.worker_servers import pid_of, wait_for_serving

_HOSTS = ("127.0.0.1", "127.0.0.2")

_NEVER_REPLACED = {
    "deconvd_server.supervision.worker:_FIRST_PAUSE_S": 3600.0,
    "deconvd_server.supervision.worker:_LONGEST_PAUSE_S": 3600.0,
}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[WorkerHost]]:
    with ExitStack() as stack, ThreadPoolExecutor() as pool:

        def start(address: str) -> WorkerHost:
            directory = tmp_path_factory.mktemp("host")
            return stack.enter_context(running_host(directory, listen=(f"{address}:0", "unix")))

        yield list(pool.map(start, _HOSTS))


@pytest.fixture(params=["tcp", "grpc"])
def F(hosts: list[WorkerHost], request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection to both, as from another host."""
    targets = [host.server.target for host in hosts]
    with deconvd_client.connect(targets, transport=request.param) as connection:
        yield connection


def counts_of(hosts: Sequence[WorkerHost]) -> dict[tuple[int, str], int]:
    """Return how many calls each worker has served, by the number of its host and its name."""
    return {
        (number, name): count
        for number, host in enumerate(hosts)
        for name, count in host.calls_counts().items()
    }


def workers_used(hosts: Sequence[WorkerHost], F: Connection, W: np.ndarray) -> set[tuple[int, str]]:
    """Return which workers serve some calls of this thread."""
    before = counts_of(hosts)
    for _ in range(5):
        F.deconvolution_2d(X, W)
    after = counts_of(hosts)
    return {worker for worker, count in after.items() if count > before[worker]}


def worker_of(hosts: Sequence[WorkerHost], F: Connection, W: np.ndarray) -> tuple[int, str]:
    """Return the only worker that serves some calls of this thread, once there is one."""
    used: set[tuple[int, str]] = set()

    def is_one() -> bool:  # at first the addresses that were given lead to any worker
        used.clear()
        used.update(workers_used(hosts, F, W))
        return len(used) == 1

    wait_until(is_one)
    return next(iter(used))


def call_until_all_are_used(hosts: Sequence[WorkerHost], F: Connection, threads: int = 4) -> None:
    """Call in several threads until each worker has served some of these calls."""
    before = counts_of(hosts)
    filters = cycle(FILTERS)
    calls = [lambda: F.deconvolution_2d(X, next(filters))] * threads

    def are_used() -> bool:
        load.wait_for(20)
        return all(count > before.get(worker, 0) for worker, count in counts_of(hosts).items())

    with repeat_calls(calls) as load:
        wait_until(are_used)
    assert load.failures == []


@contextmanager
def stopped_worker(host: WorkerHost, name: str) -> Iterator[None]:
    """Stop a worker for the block: it is there and says nothing."""
    pid = pid_of(host.server, name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_threads_use_all_workers_of_all_servers(hosts: list[WorkerHost], F: Connection) -> None:
    call_until_all_are_used(hosts, F)

    assert "2 of 2 servers" in repr(F)
    assert F.health() == "SERVING"
    assert [worker.name for worker in F.server_info().workers] == ["0", "1"]


def test_all_workers_of_a_name_are_used(hosts: list[WorkerHost]) -> None:
    port = hosts[0].server.target.rpartition(":")[2]
    with deconvd_client.connect(f"dns:///localhost:{port}", transport="tcp") as F:
        call_until_all_are_used(hosts[:1], F)


def test_a_dropped_connection_is_collected_at_once(hosts: list[WorkerHost]) -> None:
    F = deconvd_client.connect([host.server.target for host in hosts], transport="tcp")
    worker_of(hosts, F, FILTERS[0])
    reference = weakref.ref(F._server)

    del F

    wait_until(lambda: reference() is None)


@pytest.fixture
def tcp(hosts: list[WorkerHost]) -> Iterator[Connection]:
    with deconvd_client.connect([host.server.target for host in hosts], transport="tcp") as F:
        yield F


def test_each_W_stays_at_its_server_when_a_worker_of_it_stops_or_dies(
    hosts: list[WorkerHost], tcp: Connection
) -> None:
    homes = [worker_of(hosts, tcp, W) for W in FILTERS[:6]]
    assert {number for number, _ in homes} == {0, 1}
    number, name = homes[0]
    filters = [W for W, home in zip(FILTERS, homes, strict=False) if home[0] == number]
    calls = [checked(tcp, X, W) for W in filters]
    calls.append(checked(tcp, X, tcp.put(filters[0])))
    elsewhere = hosts[1 - number :][:1]
    before = sum(counts_of(elsewhere).values())

    with stopped_worker(hosts[number], name):
        for call in calls:
            call()
    with repeat_calls(calls) as load:
        load.wait_for(20)
        hosts[number].signal_worker(name, signal.SIGKILL)
        load.wait_for(20)
        wait_for_serving(hosts[number].server)
    strays_count = sum(counts_of(elsewhere).values()) - before

    assert load.failures == []
    assert strays_count < load.count / 2
    call_until_all_are_used(hosts, tcp)  # also the one that is back


def test_the_same_set_gives_the_same_bits_whichever_workers_serve(
    hosts: list[WorkerHost], tcp: Connection
) -> None:
    gy = np.random.default_rng(1).standard_normal(LARGE.shape).astype(np.float32)
    bias = np.zeros(2, np.float32)
    with tcp.using_config("cudnn_deterministic", True):
        first = tcp.deconvolution_2d_grad(LARGE, TWO, bias, gy)
        for host in hosts:
            host.signal_worker("0", signal.SIGKILL)
        second = tcp.deconvolution_2d_grad(LARGE, TWO, bias, gy)
    for host in hosts:
        wait_for_serving(host.server)

    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def holder_of(F: Connection, kept: RemoteTensor) -> tuple[Host, str]:
    """Return which worker has a result, with its host."""
    host: Any = F._server
    if isinstance(host, ServerSet):
        host = host.residents._holder_of(kept._resident).server  # type: ignore[union-attr]  # there is one
    worker = host._workers.residents._holder_of(kept._resident)
    return host, worker.identity.decode()


def test_who_wants_to_fail_fast_waits_for_no_worker_that_is_away(hosts: list[WorkerHost]) -> None:
    targets = [host.server.target for host in hosts]
    with deconvd_client.connect(targets, transport="tcp", fail_fast=True, timeout_s=120) as F:
        worker_of(hosts, F, FILTERS[0])
        kept = F.remote.deconvolution_2d(X, FILTERS[0])
        host, name = holder_of(F, kept)
        server = next(
            each.server
            for each in hosts
            if each.server.target == host.entry.route.target_stub.target
        )
        os.kill(server.process.pid, signal.SIGSTOP)  # so that nobody replaces it
        try:
            os.kill(pid_of(server, name), signal.SIGKILL)
            began_s = time.monotonic()
            with pytest.raises(UnavailableError):
                kept.numpy()
            took_s = time.monotonic() - began_s
            F.deconvolution_2d(X, FILTERS[0])
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        wait_for_serving(server)

    assert took_s < 60


@pytest.mark.parametrize("is_alone", [True, False])
def test_what_only_a_worker_had_that_has_ended_is_lost_before_it_is_replaced(
    tmp_path: Path, *, is_alone: bool
) -> None:
    with running_host(tmp_path, constants=_NEVER_REPLACED, listen=("127.0.0.1:0",)) as host:
        target = host.server.target
        targets = target if is_alone else [target, f"127.0.0.2:{free_port()}"]
        with deconvd_client.connect(targets, transport="tcp", timeout_s=60) as F:
            worker_of([host], F, FILTERS[0])
            there = F.put(FILTERS[0])
            kept = F.remote.deconvolution_2d(X, there)
            expected = kept.numpy()
            _, name = holder_of(F, kept)
            os.kill(pid_of(host.server, name), signal.SIGKILL)

            with pytest.raises(LostTensorError, match="compute it again"):
                kept.numpy()
            np.testing.assert_array_equal(F.deconvolution_2d(X, there), expected)


def test_residents_know_their_worker_and_are_sent_again_if_it_ends(
    hosts: list[WorkerHost], F: Connection
) -> None:
    expected = F.deconvolution_2d(X, FILTERS[0])
    x, W = F.put(X), F.put(FILTERS[0])
    y, pullback = F.vjp(x, W)
    kept = F.remote.deconvolution_2d(x, W)
    gx = pullback(y).gx
    before = counts_of(hosts)
    for _ in range(5):
        np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)
    after = counts_of(hosts)
    ((number, name),) = (worker for worker in after if after[worker] > before[worker])

    hosts[number].signal_worker(name, signal.SIGKILL)

    np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)
    np.testing.assert_array_equal(x.numpy(), X)
    np.testing.assert_array_equal(pullback(y).gx, gx)
    with pytest.raises(LostTensorError):
        kept.numpy()
    wait_for_serving(hosts[number].server)
