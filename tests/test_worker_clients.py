"""Clients of a real server with several processes: where their calls go, and what becomes of them if a process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import deconvd_client
from benchmarks.profiled import start_profiling
from deconvd.errors import LostTensorError, UnavailableError
from deconvd.model.home_choice import better_home
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client import Connection
from deconvd_client.cli.main import main
from deconvd_client.credentials import NO_CREDENTIALS, Credentials, Tls
from deconvd_client.server import Server
from deconvd_client.transports.route import TransportName
from deconvd_client.transports.side_sockets import any_owner
from deconvd_client.workers.addresses import worker_targets
from deconvd_client.workers.home_keeper import HomeKeeper
from deconvd_client.workers.host import Host
from deconvd_client.workers.worker_set import WorkerSet
from tests.certificates import Authority
from tests.fault_proxy import CLEAN, faulty_proxy
from tests.processes import exit_code, wait_until
from tests.servers import free_port, only_server, server_process
from tests.token_calls import write_tokens
from tests.worker_hosts import WorkerHost, running_clients, running_host
from tests.worker_servers import own_targets, wait_for_serving, workers_of

X, W = np.ones((2, 8, 16, 16), np.float32), np.ones((8, 4, 4, 4), np.float32)
LARGE = np.ones((8, 8, 64, 64), np.float32)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerHost]:
    directory = tmp_path_factory.mktemp("host")
    with running_host(directory, listen=("unix", "127.0.0.1:0")) as host:
        yield host


@pytest.fixture(params=["auto", "tcp", "grpc"])
def F(host: WorkerHost, request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection by the shared Unix socket, and by TCP alone, as from another host: direct connections, or gRPC."""
    target = host.server.targets[request.param != "auto"]
    with deconvd_client.connect(target, transport=request.param) as connection:
        yield connection


def worker_set(F: Connection) -> WorkerSet:
    """Return the workers of a connection that uses them; call until it does."""
    server = F._server
    assert isinstance(server, Host)

    def uses_workers() -> bool:
        F.deconvolution_2d(X, W)
        return isinstance(server._way, WorkerSet)

    wait_until(uses_workers)
    assert isinstance(server._way, WorkerSet)
    return server._way


def lenders(workers: WorkerSet, array: np.ndarray) -> list[str]:
    """Return which workers lend the memory of an array."""
    members = workers._membership.workers
    return [m.identity.decode() for m in members if m.server.borrower.locate(array) is not None]


def test_clients_are_balanced_and_lose_no_call_when_workers_are_killed_and_drained(
    host: WorkerHost,
) -> None:
    unix, tcp = host.server.targets
    targets = [(unix, "auto")] * 4 + [(tcp, "tcp")] * 2 + [(tcp, "auto"), (unix, "shared_memory")]

    def is_balanced() -> bool:
        counts = host.active_counts()
        return sorted(counts) == [len(targets) // 2, len(targets) // 2]

    def wait_for_balance() -> None:
        wait_until(is_balanced, timeout_s=120, pause_s=0.3)

    with running_clients(targets) as clients:
        wait_for_balance()
        host.signal_worker("0", signal.SIGKILL)
        wait_for_balance()  # it is used again
        host.signal_worker("1", signal.SIGTERM)
        wait_for_balance()
        calls_counts = [client.end() for client in clients]

    assert all(calls_counts)


def test_one_thread_keeps_to_one_worker(host: WorkerHost, F: Connection) -> None:
    workers = worker_set(F)
    home = workers._keeper.home
    before = host.calls_counts()

    for _ in range(20):
        F.deconvolution_2d(X, W)

    after = host.calls_counts()
    assert home is not None
    assert {name: after[name] - before[name] for name in after} == {
        name: 20 if name == home.identity.decode() else 0 for name in after
    }


def test_a_call_costs_no_function_more_than_without_workers(
    host: WorkerHost, tmp_path: Path
) -> None:
    with server_process(tmp_path) as alone:
        for x in (X, LARGE):
            counts = [functions_count(target, x) for target in (alone.target, host.server.target)]
            assert counts[0] == counts[1]


def functions_count(target: str, x: np.ndarray) -> int:
    """Return how many functions of the client a warm call goes through: the fewest of some calls."""
    counts: list[int] = []
    with start_profiling() as profile, deconvd_client.connect(target) as F:
        F.empty((1,), "f4")  # it is settled then who makes the calls
        for _ in range(8):
            F.deconvolution_2d(x, W)
            profile.begin()
            F.deconvolution_2d(x, W)
            counts.append(sum(map(len, profile.end())))
    return min(counts)


@pytest.mark.parametrize("is_unix", [True, False], ids=["unix", "tcp"])
def test_threads_use_all_workers_by_grpc_alone(host: WorkerHost, *, is_unix: bool) -> None:
    target = host.server.targets[0 if is_unix else 1]
    with deconvd_client.connect(target, transport="grpc") as F, ThreadPoolExecutor(2) as pool:
        workers = worker_set(F)
        before = host.calls_counts()

        def are_used() -> bool:
            for ended in [pool.submit(F.deconvolution_2d, LARGE, W) for _ in range(10)]:
                ended.result()
            return all(count > before[name] for name, count in host.calls_counts().items())

        wait_until(are_used)
        servers = [member.server for member in workers._membership.workers]
        # a TCP target may be meant to pass the network, so its host's Unix sockets are not used
        assert [each.route.target_stub.target.startswith("unix:") for each in servers] == [
            is_unix,
            is_unix,
        ]
        assert not any(each.direct_connections_count for each in servers)


def test_threads_use_all_workers_and_each_gets_memory_of_its_own(host: WorkerHost) -> None:
    with deconvd_client.connect(host.server.target) as F:
        workers = worker_set(F)
        before = host.calls_counts()
        barrier = threading.Barrier(2)

        def work() -> list[str]:
            x, y = F.empty(LARGE.shape, LARGE.dtype), F.empty((4,), "f4")
            x[:], y[:] = LARGE, 0
            barrier.wait()
            for _ in range(10):
                np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)
            return lenders(workers, x)

        expected = F.deconvolution_2d(LARGE, W)
        with ThreadPoolExecutor(2) as pool:
            places = list(pool.map(lambda _: work(), range(2)))
        after = host.calls_counts()

        assert sorted(places) == [["0"], ["1"]]
        assert all(after[name] - before[name] >= 10 for name in after)


def test_calls_with_lent_memory_go_to_the_worker_that_lends_it(host: WorkerHost) -> None:
    with deconvd_client.connect(host.server.target) as F:
        x = F.empty(LARGE.shape, LARGE.dtype)
        x[:] = LARGE
        expected = F.deconvolution_2d(x, W)
        workers = worker_set(F)
        (lender,) = lenders(workers, x)
        keeper = workers._keeper
        keeper._set_order([*reversed(keeper.order)])  # as a move of the client does
        before = host.calls_counts()

        np.testing.assert_array_equal(F.deconvolution_2d(x, W), expected)

        # a worker counts a call a moment after its answer: that of the call before, too
        wait_until(lambda: host.calls_counts()[lender] > before[lender])
        (other,) = before.keys() - {lender}
        assert host.calls_counts()[other] == before[other]
        assert keeper.home is not None
        assert keeper.home.identity.decode() != lender


def test_residents_know_their_worker_and_are_sent_again_if_it_ends(
    host: WorkerHost, F: Connection
) -> None:
    x, there = F.put(X), F.put(W)
    expected = F.deconvolution_2d(X, W)
    y, pullback = F.vjp(X, W)
    kept = F.remote.deconvolution_2d(x, there)
    workers = worker_set(F)
    holders = [m for m in workers._membership.workers if m.server.residents.has_session]
    assert len(holders) == 1
    gx = pullback(y).gx

    host.signal_worker(holders[0].identity.decode(), signal.SIGKILL)

    np.testing.assert_array_equal(F.deconvolution_2d(x, there), expected)
    np.testing.assert_array_equal(pullback(y).gx, gx)
    with pytest.raises(LostTensorError):
        kept.numpy()
    wait_for_serving(host.server)


def test_what_a_forked_child_cannot_have_is_no_workers_failure(F: Connection) -> None:
    members = worker_set(F)._membership.workers

    def is_refused_at_once() -> bool:
        before = [(member.state, member.probe_s) for member in members]
        for _ in range(len(members) + 1):
            with pytest.raises(UnavailableError, match="a forked child"):
                F.put(W)
        return before == [(member.state, member.probe_s) for member in members]

    assert exit_code(is_refused_at_once) == 0


def test_the_server_says_what_it_is_made_of(host: WorkerHost, F: Connection) -> None:
    worker_set(F)

    info = F.server_info()

    assert info.worker_name in ("0", "1")
    assert [(each.name, each.devices, each.is_serving) for each in info.workers] == [
        ("0", ("cpu",), True),
        ("1", ("cpu",), True),
    ]
    assert F.health() == "SERVING"
    assert "2 of 2 workers in use" in repr(F)
    ended = CliRunner().invoke(main, ["status", "--target", host.server.target])
    assert ended.exit_code == 0
    assert "worker 0 (cpu) serves" in ended.output
    assert "worker 1 (cpu) serves" in ended.output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_calls_are_direct_if_workers_cannot_be_looked_for(
    host: WorkerHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_keeper: HomeKeeper, _info: pb.GetServerInfoResponse) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(HomeKeeper, "begin", fail)
    with deconvd_client.connect(host.server.targets[1], transport="tcp") as F:
        server = only_server(F)
        wait_until(
            lambda: F.deconvolution_2d(X, W) is not None and server.direct_connections_count > 0
        )


def test_a_home_that_has_just_ended_is_left_to_those_who_notice_it(
    host: WorkerHost, F: Connection
) -> None:
    keeper = worker_set(F)._keeper
    home = keeper.home
    assert home is not None
    loads = {worker.name: 0 for worker in workers_of(host.server)}
    del loads[home.identity.decode()]  # as of a list that was made a moment later

    keeper._move_if_better(home, loads)

    assert F.deconvolution_2d(X, W).shape == (2, 4, 19, 19)


def test_who_only_looks_by_grpc_alone_uses_no_worker(host: WorkerHost) -> None:
    with deconvd_client.connect(host.server.targets[1], transport="grpc") as F:
        names = {F.server_info().worker_name for _ in range(4)}
        assert F.health() == "SERVING"
        assert isinstance(F._server, Host)
        assert F._server._workers is None
        worker_set(F)  # once it calls

    assert len(names) == 1


def test_a_server_that_gets_workers_is_used_by_them_and_one_that_loses_them_alone(
    tmp_path: Path,
) -> None:
    target = f"unix:{tmp_path}/deconvd.sock"
    with deconvd_client.connect(target) as F:
        host = F._server
        assert isinstance(host, Host)
        with server_process(tmp_path):
            F.deconvolution_2d(LARGE, W)
            wait_until(lambda: F.deconvolution_2d(X, W) is not None and host._is_settled)
            assert isinstance(host._way, Server)
        with running_host(tmp_path):
            worker_set(F)
        with server_process(tmp_path):
            wait_until(
                lambda: F.deconvolution_2d(X, W) is not None and isinstance(host._way, Server)
            )


def test_who_calls_a_worker_at_its_own_address_wants_that_one(host: WorkerHost) -> None:
    for worker in workers_of(host.server):
        for target in own_targets(worker):
            with deconvd_client.connect(target) as F:
                F.put(X)
                F.deconvolution_2d(LARGE, W)
                assert isinstance(F._server, Host)
                assert F._server._is_settled
                assert isinstance(F._server._way, Server)
                assert F.server_info().worker_name == worker.name


@pytest.mark.parametrize("transport", ["tcp", "grpc"])
def test_who_answers_in_place_of_a_worker_gets_nothing(tmp_path: Path, transport: str) -> None:
    """Behind an address of which only the shared port leads to the server."""
    port = free_port()
    (tmp_path / "stranger").mkdir()
    with (
        running_host(tmp_path, "--worker-port", str(port), listen=("127.0.0.1:0", "unix")) as host,
        server_process(tmp_path / "stranger", listen=(f"127.0.0.2:{port}",)) as stranger,
        faulty_proxy(host.server.targets[0], CLEAN, host="127.0.0.2") as proxy,
        deconvd_client.connect(proxy.target, transport=transport) as F,
        deconvd_client.connect(stranger.target, transport="grpc") as of_stranger,
    ):
        server = F._server
        assert isinstance(server, Host)
        wait_until(lambda: F.deconvolution_2d(X, W) is not None and server._is_settled)
        F.put(X)
        assert F.health() == "SERVING"
        assert isinstance(server._way, Server)
        counts = of_stranger.server_info().counts

    assert counts is not None
    assert {each.method for each in counts.methods} <= {"GetServerInfo"}


def test_with_tls_a_token_gets_a_client_to_all_workers(tmp_path: Path) -> None:
    files = Authority(tmp_path)
    server = files.issue("localhost")
    tokens = write_tokens(tmp_path / "tokens", {"a-token": "alice"})
    options = ["--tls-cert", str(server.cert), "--tls-key", str(server.key)]
    options += ["--tokens", str(tokens)]
    tls = Tls(ca=files.ca)
    with server_process(tmp_path, "--processes", "2", *options, listen=("127.0.0.1:0",)) as process:
        target = f"localhost:{process.target.rpartition(':')[2]}"
        with deconvd_client.connect(target, tls=tls, token="a-token", transport="tcp") as F:
            worker_set(F)

            def uses_both() -> (
                bool
            ):  # the second may serve later, which is noticed while calls are made
                F.deconvolution_2d(LARGE, W)
                return "2 of 2 workers" in repr(F)

            wait_until(uses_both, timeout_s=120)
            assert F.server_info().worker_name in ("0", "1")


def test_a_token_goes_to_no_port_that_has_not_proved_whose_it_is() -> None:
    worker = pb.Worker(name="1", grpc_port=7001, unix_sockets=["/nowhere/deconvd.sock.1"])
    cases = {
        NO_CREDENTIALS: ["gpu:7001"],
        Credentials(lambda: "secret"): [],
        Credentials(lambda: "secret", Tls()): ["gpu:7001"],
    }
    for credentials, expected in cases.items():
        found = worker_targets(worker, "gpu:50051", TransportName.AUTO, credentials, any_owner)
        assert found == expected
        only_unix = worker_targets(worker, "gpu:50051", TransportName.UNIX, credentials, any_owner)
        assert only_unix == []


@pytest.mark.parametrize(
    ("loads", "home", "expected"),
    [
        pytest.param("1 0 0 0", "0", "2", id="to an empty device"),
        pytest.param("1 0 1 0", "0", "1", id="on its device"),
        pytest.param("1 1 1 0", "0", "3", id="to the other device"),
        pytest.param("0 1 1 0", "0", None, id="nobody is with it"),
        pytest.param("2 1 2 2", "0", "1", id="to a worker whose device has fewer"),
        pytest.param("3 3 2 3", "1", "2", id="from the fuller device"),
        pytest.param("2 2 1 3", "1", "2", id="to an emptier worker of a device that is as full"),
    ],
)
def test_a_client_moves_where_it_is_less_crowded(
    loads: str, home: str, expected: str | None
) -> None:
    devices = {"0": "cuda:0", "1": "cuda:0", "2": "cuda:1", "3": "cuda:1"}
    others = dict(zip("0123", map(int, loads.split()), strict=True))

    assert better_home(home, others, devices) == expected
