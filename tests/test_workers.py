"""A server of several processes, seen from the outside: who answers where, and what a process's end costs."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from threading import Thread
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.__main__ import main
from deconvd_server.exit_codes import ExitCode
from tests.fleets import checked, repeat_calls
from tests.processes import wait_until
from tests.servers import ServerProcess, free_port, server_process
from tests.worker_servers import (
    ask,
    own_targets,
    pid_of,
    pids,
    stock_session,
    stock_stub,
    wait_for_serving,
    workers_of,
)

X = np.ones((2, 8, 4, 4), np.float32)
W = np.ones((8, 4, 4, 4), np.float32)
ENDLESS_X = np.ones((64, 64, 64, 64), np.float32)  # with ENDLESS_W, a minute of work
ENDLESS_W = np.ones((64, 64, 33, 33), np.float32)

_SHARED = ("127.0.0.1:0", "unix")

_DIES_AT_START = """
import json, os, signal
orders = json.loads(os.environ.get("_DECONVD_WORKER", "{}"))
if orders.get("name") == "1":
    os.kill(os.getpid(), signal.SIGKILL)
"""

_IS_BLOCKED_LATER = """
import json, os, threading, time
from deconvd_server.resources.worker_table import WORKERS
from deconvd_server.transports.grpc.server import GrpcServer

def tell_on():  # as direct connections have it that begin and end
    while True:
        WORKERS.tell_load()
        time.sleep(0.2)

def start_and_hang(self):
    start(self)
    if orders.get("name") == "0" and not os.path.exists("{0}"):
        open("{0}", "x").close()
        threading.Thread(target=tell_on, daemon=True).start()
        self.call_later(1.0, lambda: time.sleep(3600))

orders = json.loads(os.environ.get("_DECONVD_WORKER", "{{}}"))
start, GrpcServer.start = GrpcServer.start, start_and_hang
"""

_CANNOT_START = """
import os, sys
if "_DECONVD_WORKER" in os.environ:
    sys.exit("deconvd-server: this one cannot start")
"""


def tensor(array: Array) -> pb.Tensor:
    return pb.Tensor(element_type=pb.ELEMENT_TYPE_FLOAT32, shape=array.shape, raw=array.tobytes())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of two processes that no test ends."""
    directory = tmp_path_factory.mktemp("two")
    with server_process(directory, "--processes", "2", listen=_SHARED) as server:
        wait_for_serving(server)
        yield server


def test_clients_learn_of_all_processes_and_reach_each_of_them(two: ServerProcess) -> None:
    workers = workers_of(two)

    assert [worker.name for worker in workers] == ["0", "1"]
    assert all(worker.is_serving and worker.devices == ["cpu"] for worker in workers)
    infos = [ask(target) for worker in workers for target in own_targets(worker)]
    assert [info.worker_name for info in infos] == ["0", "0", "1", "1"]
    assert [info.instance_id for info in infos] == [w.instance_id for w in workers for _ in "ab"]
    assert len({info.direct_port for info in infos}) == 2
    for info in infos:
        (own,) = (worker for worker in workers if worker.name == info.worker_name)
        assert info.unix_sockets == own.unix_sockets
        assert list(info.workers) == list(workers)


def test_any_process_answers_where_they_listen_together(two: ServerProcess) -> None:
    tcp, unix = two.targets
    asked = [ask(tcp).worker_name for _ in range(40)]

    assert set(asked) == {"0", "1"}  # but for one run in 10^11
    assert len({ask(unix).worker_name for _ in range(4)}) == 1


def test_a_stock_client_learns_where_its_session_and_its_tensors_are(two: ServerProcess) -> None:
    first, other = workers_of(two)
    request = pb.DeconvolveRequest(x=tensor(X), w=tensor(W), keep_y=True)
    with (
        stock_stub(own_targets(first)[0]) as here,
        stock_stub(own_targets(other)[0]) as elsewhere,
        stock_session(here) as name,
    ):
        request.session = name
        y = here.Deconvolve(request).y
        with pytest.raises(grpc.RpcError) as raised:
            elsewhere.Deconvolve(request)
        with pytest.raises(grpc.RpcError) as raised_too:
            next(elsewhere.GetTensor(pb.GetTensorRequest(session=name, resident=y.resident)))
        found = here.GetTensor(pb.GetTensorRequest(session=name, resident=y.resident))
        elements = b"".join(part.chunk for part in found)

    assert len(elements) == 2 * 4 * 7 * 7 * 4
    assert name[0] == y.resident.handle[0] == int(first.name)
    for error in raised.value, raised_too.value:
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert f"worker 0 has made it, which alone answers on port {first.grpc_port}" in str(
            error.details()
        )


def test_nobody_says_whose_a_name_is_that_no_process_has_made(two: ServerProcess) -> None:
    request = pb.DeconvolveRequest(x=tensor(X), w=tensor(W), session=b"\x77" * 16, keep_y=True)
    with stock_stub(two.target) as stub, pytest.raises(grpc.RpcError) as raised:
        stub.Deconvolve(request)

    assert raised.value.code() is grpc.StatusCode.NOT_FOUND
    assert "has made it" not in str(raised.value.details())


def test_our_client_needs_to_know_nothing_of_it(two: ServerProcess) -> None:
    for target in two.targets:
        with deconvd_client.connect(target) as F:
            there = F.put(W)
            y = F.deconvolution_2d(X, there)
            kept = F.remote.deconvolution_2d(X, W)

            np.testing.assert_array_equal(kept.numpy(), y)


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGFPE])
def test_a_process_that_dies_costs_its_own_calls_a_retry_and_nobody_else_anything(
    socket_directory: Path, death: signal.Signals
) -> None:
    with server_process(socket_directory, "--processes", "3", listen=_SHARED) as server:
        before = wait_for_serving(server, 3)
        leader = int(ask(server.targets[1]).worker_name)
        others = [worker for worker in before if worker.name != str(leader)]
        with ExitStack() as stack:

            def connect(target: str, *, fail_fast: bool = False) -> deconvd_client.Connection:
                return stack.enter_context(deconvd_client.connect(target, fail_fast=fail_fast))

            sharers = [connect(target) for target in (*server.targets, server.targets[0])]
            own = [connect(own_targets(worker)[0], fail_fast=True) for worker in others]
            resident = own[0].put(W)
            calls = [checked(F, X, W) for F in (*sharers, *own)] + [checked(own[0], X, resident)]
            with repeat_calls(calls) as load:
                load.wait_for(30)
                os.kill(pid_of(server, str(leader)), death)
                wait_until(lambda: f"was ended by {death.name}" in server.log.read_text())
                load.wait_for(30)
                after = wait_for_serving(server, 3)
                load.wait_for(30)
        code = server.end()

    assert load.failures == []
    assert code == ExitCode.DRAINED
    assert f"was ended by {death.name}; the next one starts in 0.2 s" in server.log.read_text()
    for old, new in zip(before, after, strict=True):
        assert (new.instance_id == old.instance_id) == (old.name != str(leader))
        assert (new.name, new.grpc_port, new.unix_sockets) == (
            old.name,
            old.grpc_port,
            old.unix_sockets,
        )


def test_processes_that_hang_are_replaced_but_not_if_all_were_stopped_together(
    socket_directory: Path,
) -> None:
    constants = {
        "deconvd_server.supervision.supervise:_HUNG_S": 3.0,
        "deconvd_server.shutdown:_BLOCKED_S": 1.0,
    }
    prelude = _IS_BLOCKED_LATER.format(socket_directory / "was_blocked")
    options = ["--processes", "3"]
    with server_process(socket_directory, *options, constants=constants, prelude=prelude) as server:
        wait_until(lambda: server.log.read_text().count("serves on") == 3)
        os.kill(pid_of(server, "1"), signal.SIGSTOP)
        for name in "01":
            ended = f"worker {name} (cpu) was ended by SIGKILL"
            wait_until(lambda ended=ended: ended in server.log.read_text())  # type: ignore[misc]
        assert "worker 1 (cpu) has been silent for" in server.log.read_text()
        assert re.search(r"worker 0.* gRPC's thread has not run for 1 s", server.log.read_text())
        wait_for_serving(server, 3)

        started = pids(server)
        for pid in (*started, server.process.pid):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3.5)  # longer than one of them may be silent
        for pid in (server.process.pid, *started):
            os.kill(pid, signal.SIGCONT)
        wait_for_serving(server, 3)
        assert set(pids(server)) & set(started)
        code = server.end()

    assert code == ExitCode.DRAINED


def test_if_all_processes_die_calls_wait_for_the_next_ones(socket_directory: Path) -> None:
    health_port = free_port()
    options = ["--processes", "2", "--health-port", str(health_port)]
    with server_process(socket_directory, *options, listen=_SHARED) as server:
        wait_for_serving(server)
        with (
            deconvd_client.connect(server.targets[0]) as F,
            deconvd_client.connect(f"127.0.0.1:{health_port}") as probe,
        ):
            call = checked(F, X, W)
            for pid in pids(server):
                os.kill(pid, signal.SIGKILL)
            wait_until(lambda: probe.health() == "NOT_SERVING")
            call()
            health = probe.health()
            wait_for_serving(server)
        code = server.end(signal.SIGINT)

    assert health == "SERVING"
    assert code == ExitCode.DRAINED
    assert sorted(path.name for path in socket_directory.iterdir()) == ["server.log"]


def test_a_process_that_never_starts_leaves_the_others_serving(socket_directory: Path) -> None:
    options = ["--processes", "2", "--log-format", "json"]
    with server_process(socket_directory, *options, prelude=_DIES_AT_START) as server:
        wait_until(lambda: "starts in 0.8 s" in server.log.read_text())
        workers = wait_for_serving(server, 1)
        with deconvd_client.connect(server.target) as F:
            F.deconvolution_2d(X, W)
            health = F.health()
        code = server.end()  # while one waits to be started again

    assert (health, code) == ("SERVING", ExitCode.DRAINED)
    assert [worker.is_serving for worker in workers] == [True, False]
    pauses = re.findall(r"worker 1 .*next one starts in (\S+) s", server.log.read_text())
    assert pauses[:3] == ["0.2", "0.4", "0.8"]
    assert '"worker": "0"' in server.log.read_text()


def test_a_supervisor_without_descriptors_waits_for_some(socket_directory: Path) -> None:
    with server_process(socket_directory, "--processes", "2") as server:
        wait_for_serving(server)
        limits = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        killed = pid_of(server, "0")
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: "worker 0 (cpu) cannot be started" in server.log.read_text())
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, limits)
        wait_for_serving(server)
        code = server.end()

    assert code == ExitCode.DRAINED


def test_if_no_process_can_start_it_ends_and_says_why(socket_directory: Path) -> None:
    options = ["--device", "cpu", "--processes", "2", "--listen", f"unix:{socket_directory}/a"]
    command = f"{_CANNOT_START}\nfrom deconvd_server.__main__ import main\nmain()"

    ended = subprocess.run(
        [sys.executable, "-c", command, *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ended.returncode == ExitCode.FAILED
    assert "deconvd-server: this one cannot start" in ended.stderr
    assert ended.stdout == ""
    assert list(socket_directory.iterdir()) == []


def test_the_processes_end_with_one_that_is_killed(socket_directory: Path) -> None:
    with server_process(socket_directory, "--processes", "2") as server:
        wait_for_serving(server)
        started = pids(server)
        assert len(started) == 2
        server.end(signal.SIGKILL)

        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started))

    with server_process(socket_directory) as successor:  # at the same path
        assert ask(successor.target).worker_name == ""


def test_ctrl_c_ends_it_and_a_second_one_cuts_calls_short(socket_directory: Path) -> None:
    with server_process(socket_directory, "--processes", "2") as server:
        wait_for_serving(server)
        with deconvd_client.connect(server.target, fail_fast=True) as F:
            caller = Thread(target=_call_in_vain, args=(F,))
            caller.start()
            infos = [partial(ask, own_targets(worker)[0]) for worker in workers_of(server)]
            wait_until(lambda: any(info().devices[0].running_calls_count for info in infos))
            server.process.send_signal(signal.SIGINT)
            # the supervisor says so, and both workers
            wait_until(lambda: server.log.read_text().count("draining") == 3)
            code = server.end(signal.SIGINT)
            caller.join()

    assert code == ExitCode.CUT_SHORT


def _call_in_vain(F: deconvd_client.Connection) -> None:
    with pytest.raises(deconvd_client.DeconvdError):
        F.deconvolution_2d(ENDLESS_X, ENDLESS_W)


def test_metrics_are_added_up_and_never_shrink(socket_directory: Path) -> None:
    port = free_port()
    options = ["--processes", "2", "--metrics-port", str(port)]

    def scrape(name: str) -> float:
        with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            text = answer.read().decode()
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if re.match(rf"{name}(\{{.*\}})? ", line)
        )

    calls = r'deconvd_calls_total\{method="Deconvolve",.*\}'
    with server_process(socket_directory, *options, listen=_SHARED) as server:
        workers = wait_for_serving(server)
        for worker in workers:
            with stock_stub(own_targets(worker)[0]) as stub:
                for _ in range(3):
                    stub.Deconvolve(pb.DeconvolveRequest(x=tensor(X), w=tensor(W)))
        wait_until(lambda: scrape(calls) == 6)
        os.kill(pid_of(server, "0"), signal.SIGKILL)
        wait_until(lambda: scrape("deconvd_worker_restarts_total") == 1)
        wait_until(lambda: scrape("deconvd_workers_serving") == 2)

        assert scrape(calls) == 6
        assert scrape("deconvd_workers") == 2
        assert scrape("deconvd_ready") == 1


def test_ports_follow_each_other(socket_directory: Path) -> None:
    direct, own = free_port(2), free_port(2)
    options = ["--processes", "2", "--direct-port", str(direct), "--worker-port", str(own)]
    with server_process(socket_directory, *options, listen=("127.0.0.1:0",)) as server:
        workers = wait_for_serving(server)
        infos = [ask(own_targets(worker)[0]) for worker in workers]

        assert [worker.grpc_port for worker in workers] == [own, own + 1]
        assert [info.direct_port for info in infos] == [direct, direct + 1]
        for info in infos:
            with deconvd_client.connect(f"127.0.0.1:{own + int(info.worker_name)}") as F:
                F.deconvolution_2d(X, W)


@pytest.mark.parametrize("count", ["-1", "65", "two"])
def test_wrong_numbers_of_processes_are_refused(count: str) -> None:
    ended = CliRunner().invoke(main, ["--device", "cpu", "--processes", count])

    assert ended.exit_code == ExitCode.WRONG_OPTION
    assert "Invalid value for '--processes'" in ended.output


def test_ports_that_would_not_all_be_ports_are_refused() -> None:
    command = [sys.executable, "-m", "deconvd_server", "--device", "cpu", "--processes", "3"]
    ended = subprocess.run(
        [*command, "--direct-port", "65534"], capture_output=True, text=True, check=False
    )

    assert ended.returncode == ExitCode.WRONG_OPTION
    assert "Invalid value for '--direct-port'" in ended.stderr


def test_one_process_needs_no_other(socket_directory: Path) -> None:
    with server_process(socket_directory, "--processes", "1") as server:
        info = ask(server.target)

        assert pids(server) == []
        assert (list(info.workers), info.worker_name) == ([], "")


def test_a_local_server_may_have_several() -> None:
    with deconvd_client.local(processes=2, threads=2) as F:
        np.testing.assert_array_equal(F.deconvolution_2d(X, W).shape, (2, 4, 7, 7))


@pytest.mark.parametrize(("number", "processes"), [(0, "0"), (0, "2"), (1, "2")])
def test_another_server_gets_none_of_its_addresses(
    two: ServerProcess, number: int, processes: str
) -> None:
    command = [sys.executable, "-m", "deconvd_server", "--device", "cpu"]
    options = ["--listen", two.targets[number], "--processes", processes]

    ended = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=60, check=False
    )

    assert ended.returncode == ExitCode.FAILED
    assert "in use" in ended.stderr or "a live server listens there" in ended.stderr
    assert ask(two.targets[1]).worker_name in ("0", "1")
