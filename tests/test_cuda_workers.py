"""Processes that serve as one, on cards: what they share, and what the end of one costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.problem import Problem, TensorSpec
from deconvd_client import Connection, RemoteTensor
from deconvd_server.exit_codes import ExitCode
from deconvd_server.supervision.devices import devices_of
from tests import definition
from tests.fleets import repeat_calls
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.worker_servers import ask, own_targets, pid_of, pids, wait_for_serving

pytestmark = pytest.mark.gpu

_SHARED = ("127.0.0.1:0", "unix")

_random = np.random.default_rng(0)
X = _random.standard_normal((4, 16, 12, 12)).astype(np.float32)
W = _random.standard_normal((16, 8, 4, 4)).astype(np.float32)
Y = definition.deconvolve(
    Problem(TensorSpec(X.shape, X.dtype), TensorSpec(W.shape, W.dtype), Geometry((2, 2), (1, 1))),
    X,
    W,
)


@pytest.fixture(params=["two on one card", "one on each card"])
def server(request: pytest.FixtureRequest, socket_directory: Path) -> Iterator[ServerProcess]:
    """A server of two processes or more."""
    if request.param == "two on one card":
        count, device = "2", "cuda:0"
    else:
        count, device = "1", "cuda"
        if len(devices_of(device)) == 1:
            pytest.skip("there is one card alone")
    options = ["--processes", count]
    with server_process(socket_directory, *options, device=device, listen=_SHARED) as running:
        wait_for_serving(running, len(pids(running)))
        yield running


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_by_default_each_of_several_cards_has_a_process(
    socket_directory: Path, device: str
) -> None:
    count = len(devices_of(device))
    with server_process(socket_directory, device=device, chooses_processes=True) as running:
        workers = wait_for_serving(running, count) if count > 1 else ()
        info = ask(running.target)
        compiled = [orders["is_plan_store_lasting"] for orders in map(orders_of, pids(running))]
        assert len(pids(running)) == len(workers) == (count if count > 1 else 0)
        code = running.end()

    assert [each.devices[0] for each in workers] == [f"cuda:{n}" for n in range(len(workers))]
    assert [each.id for each in info.devices] == [f"cuda:{info.worker_name or 0}"]
    assert not any(compiled)
    assert code == ExitCode.DRAINED


def test_cards_that_are_all_too_old_are_known_before_processes_start_for_them() -> None:
    old = "import deconvd_server.device.cuda.api.runtime as r; r._OLDEST_CAPABILITY = 999"
    ask_for = "from deconvd_server.device.opening import device_ids; print(device_ids({!r}))"

    def run(device: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", f"{old}\n{ask_for.format(device)}"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("auto").stdout == "['cpu']\n"
    assert "is too old: an Ampere card" in run("cuda").stderr


def right_call(F: Connection, there: Array | RemoteTensor) -> Callable[[], None]:
    """Return a function that makes a call, and raises an error unless the result is right."""

    def call() -> None:
        y = F.deconvolution_2d(X, there, stride=2, pad=1)
        # sums of 64 products in float32
        np.testing.assert_allclose(y, Y, rtol=1e-4, atol=1e-4)

    return call


def orders_of(pid: int) -> dict[str, Any]:
    """Return what a process was given by its supervisor."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    (text,) = (each for each in variables if each.startswith(b"_DECONVD_WORKER="))
    orders: dict[str, Any] = json.loads(text.partition(b"=")[2])
    return orders


def test_each_process_has_its_part_of_a_card(server: ServerProcess) -> None:
    infos = [ask(own_targets(worker)[0]) for worker in wait_for_serving(server, len(pids(server)))]
    by_card: dict[str, int] = {}
    for info in infos:
        (device,) = info.devices
        by_card[device.id] = by_card.get(device.id, 0) + device.budget_bytes
        assert by_card[device.id] <= 0.91 * device.memory_bytes
    assert len(infos) > 1
    if len(by_card) > 1:
        assert list(by_card) == [f"cuda:{info.worker_name}" for info in infos]
    for info in infos:
        with deconvd_client.connect(f"unix:{info.unix_sockets[0]}") as F:
            right_call(F, W)()
            right_call(F, F.put(W))()


def test_the_supervisor_opens_no_card(server: ServerProcess) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps").read_text()
    workers_maps = [Path(f"/proc/{pid}/maps").read_text() for pid in pids(server)]

    assert "libcuda" not in maps
    assert all("libcuda" in each for each in workers_maps)


def test_a_process_that_is_killed_costs_a_retry_and_its_plans_folder_stays(
    server: ServerProcess,
) -> None:
    count = len(pids(server))
    folders = {str(orders_of(pid)["options"]["plan_store"]) for pid in pids(server)}
    leader = ask(server.targets[1]).worker_name
    others = [w for w in wait_for_serving(server, count) if w.name != leader]
    with (
        deconvd_client.connect(server.targets[0]) as by_tcp,
        deconvd_client.connect(server.targets[1]) as by_unix,
        deconvd_client.connect(own_targets(others[0])[0], fail_fast=True) as of_another,
    ):
        # W of the one that is killed must be sent again
        calls = [right_call(F, F.put(W)) for F in (by_tcp, by_unix, of_another)]
        calls += [right_call(F, W) for F in (by_tcp, by_unix, of_another)]
        for call in calls:
            call()
        with repeat_calls(calls) as load:
            load.wait_for(100)
            os.kill(pid_of(server, leader), signal.SIGKILL)
            wait_until(lambda: "was ended by SIGKILL" in server.log.read_text())
            load.wait_for(100)
            wait_for_serving(server, count)
            load.wait_for(100)
        (folder,) = folders
        assert (Path(folder) / "journals").is_dir()
        assert folders == {str(orders_of(pid)["options"]["plan_store"]) for pid in pids(server)}
    code = server.end()

    assert load.failures == []
    assert code == ExitCode.DRAINED
    assert not Path(folder).exists()
