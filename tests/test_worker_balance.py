"""How the clients of a server with several processes share them: those that begin together, leave, come, are forked."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import wait_until
from tests.worker_hosts import (
    WorkerHost,
    homes_of_children,
    running_client_processes,
    running_host,
)

NAMES = ("0", "1", "2", "3")


# where a machine is slow, clients take long to come, and pause between calls
PATIENT = {
    "deconvd_server.supervision.home_requests:_PATIENCE_S": 30.0,
    "deconvd_server.supervision.home_claims:_CLAIM_S": 60.0,
    "deconvd_server.transports.direct.server:_RECENT_S": 60.0,
}


_FORKED_EARLY = """
import os, sys, threading, traceback
import numpy as np
import deconvd_client
from deconvd_client.workers.worker_set import WorkerSet
from tests.processes import wait_until

parent, is_looking, begin = os.getpid(), threading.Event(), WorkerSet.begin

def begin_for_ever(self, info):
    if os.getpid() == parent:
        is_looking.set()
        threading.Event().wait()
    begin(self, info)

WorkerSet.begin = begin_for_ever
x, W = np.ones((2, 8, 16, 16), np.float32), np.ones((8, 4, 4, 4), np.float32)
F = deconvd_client.connect(sys.argv[1])
F.deconvolution_2d(x, W)
assert is_looking.wait(60)

def uses_workers():
    F.deconvolution_2d(x, W)
    return isinstance(F._server._way, WorkerSet)

child = os.fork()
if not child:
    code = 1
    try:
        wait_until(uses_workers)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
os._exit(code)
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerHost]:
    directory = tmp_path_factory.mktemp("host")
    listen = ("unix", "127.0.0.1:0")
    with running_host(directory, count=4, listen=listen, constants=PATIENT) as host:
        yield host


@pytest.fixture(autouse=True)
def _without_clients(host: WorkerHost) -> None:
    """Wait until the clients of the test before are gone for all."""
    wait_until(lambda: host.told_counts() == {(0, 0, 0, 0)})


def counts(homes: list[str]) -> list[int]:
    """Return how many clients keep to each worker."""
    found = Counter(homes)
    return [found[name] for name in NAMES]


@pytest.mark.parametrize("number", [0, 1], ids=["unix", "tcp"])
def test_clients_that_begin_together_are_balanced_at_once(host: WorkerHost, number: int) -> None:
    with running_client_processes(host.server.targets[number], 4) as clients:
        assert counts(clients.begin(4)) == [4, 4, 4, 4]


def test_clients_that_begin_take_the_places_of_those_that_have_left(host: WorkerHost) -> None:
    with running_client_processes(host.server.target, 2) as clients:
        assert counts(clients.begin(6)) == [3, 3, 3, 3]
        clients.leave("0", "2")
        wait_until(lambda: host.told_counts() == {(0, 3, 0, 3)})
        assert counts(clients.begin(3)) == [3, 3, 3, 3]


def test_processes_that_are_forked_in_one_moment_are_balanced(host: WorkerHost) -> None:
    found = counts(homes_of_children(host.server.target, 7))

    assert found == [2, 2, 2, 2]


def test_a_process_that_is_forked_while_workers_are_looked_for_finds_them(host: WorkerHost) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _FORKED_EARLY, host.server.target],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr


def test_where_the_server_names_no_home_clients_find_their_balance(tmp_path: Path) -> None:
    constants = {"deconvd_server.supervision.home_claims:_MOST_CLAIMS_COUNT": 0}
    with (
        running_host(tmp_path, constants=constants) as host,
        running_client_processes(host.server.target, 1) as clients,
    ):
        clients.begin(6)
        wait_until(lambda: counts(clients.homes()) == [3, 3, 0, 0], timeout_s=120, pause_s=0.3)
