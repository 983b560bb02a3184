"""A server with several processes whose own ports a firewall drops: clients find that out soon, and do without."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection
from deconvd_client.server import Server
from deconvd_client.workers import vain_tries
from deconvd_client.workers.host import Host
from deconvd_client.workers.vain_tries import VainTries
from deconvd_client.workers.worker_set import WorkerSet
from tests.fault_proxy import CLEAN, faulty_proxy
from tests.processes import wait_until
from tests.servers import free_port
from tests.worker_hosts import running_host

X, W = np.ones((2, 8, 16, 16), np.float32), np.ones((8, 4, 4, 4), np.float32)

COUNT = 4
OUTSIDE = "127.0.0.2"
"""The address by which clients reach the server, through proxies: some of its ports, as a firewall has it."""

MOST_S = 2.5 + 20.0
"""How long it takes until no worker's port has answered, and the slack of a machine that others use, too."""


@contextmanager
def silent_port(port: int) -> Iterator[None]:
    """Have a port for the block at which packets vanish: its queue is full, and nobody takes connections from it."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((OUTSIDE, port))
        listener.listen(0)
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex((OUTSIDE, port))
        yield


@pytest.fixture
def silenced(tmp_path: Path) -> Iterator[tuple[Connection, list[int], ExitStack]]:
    """A connection to a server of which only the shared port and those for direct connections can be reached.

    Also the workers' ports, and what ends the silence there.
    """
    own, direct = free_port(COUNT), free_port(COUNT)
    ports = [own + number for number in range(COUNT)]
    options = ["--worker-port", str(own), "--direct-port", str(direct)]
    with (
        ExitStack() as stack,
        running_host(tmp_path, *options, count=COUNT, listen=("127.0.0.1:0",)) as host,
        faulty_proxy(host.server.target, CLEAN, host=OUTSIDE) as shared,
        ExitStack() as silence,
    ):
        for port in range(direct, direct + COUNT):
            stack.enter_context(
                faulty_proxy(f"127.0.0.1:{port}", CLEAN, host=OUTSIDE, own_port=port)
            )
        for port in ports:
            silence.enter_context(silent_port(port))
        with deconvd_client.connect(shared.target, transport="tcp") as F:
            yield F, ports, silence


def test_workers_that_cannot_be_reached_are_given_up_soon_and_found_later(
    silenced: tuple[Connection, list[int], ExitStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vain_tries, "_PAUSE_FACTOR", 1e3)  # longer than this test, on any machine
    F, ports, silence = silenced
    server = F._server
    assert isinstance(server, Host)

    began_s = time.monotonic()
    F.deconvolution_2d(X, W)
    wait_until(
        lambda: F.deconvolution_2d(X, W) is not None and server.entry.direct_connections_count > 0
    )
    assert time.monotonic() - began_s < MOST_S

    workers = server._workers
    assert workers is not None
    assert isinstance(server._way, Server)
    for _ in range(3):
        F.server_info()  # an answer of the server is no reason to look again
    assert workers._membership.pause_s > 100.0
    wait_until(lambda: workers._keeper.is_dormant)

    silence.close()
    monkeypatch.setattr(VainTries, "remaining_s", lambda *_: 0.0)  # as if the pause were over
    with ExitStack() as stack:
        for port in ports:
            stack.enter_context(
                faulty_proxy(f"127.0.0.1:{port}", CLEAN, host=OUTSIDE, own_port=port)
            )
        F.server_info()
        wait_until(
            lambda: F.deconvolution_2d(X, W) is not None and isinstance(server._way, WorkerSet)
        )


def test_a_place_is_left_alone_for_longer_the_longer_a_try_takes_and_the_more_fail() -> None:
    tries = VainTries()
    place, other = ("gpu:1", "a"), ("gpu:2", "b")

    tries.note(place, 2.0)
    first_s = tries.remaining_s(place)
    tries.note(place, 2.0)
    second_s = tries.remaining_s(place)
    tries.note(other, 1e-3)

    assert 5.0 < first_s <= 10.0
    assert 15.0 < second_s <= 20.0
    assert tries.remaining_s(other) <= 5e-3
    for _ in range(20):
        tries.note(place, 2.0)
    assert 500.0 < tries.remaining_s(place) <= 600.0
    tries.keep([other])
    assert tries.remaining_s(place) == 0.0
