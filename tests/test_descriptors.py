"""File descriptors: however many connections one client opens, health is answered and others are served."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deconvd_client
from deconvd_server.resources.descriptors import DescriptorGuard, _longest_idle
from tests.direct_calls import calls_path, get_server_info
from tests.processes import process_resources
from tests.servers import ServerProcess, server_process

X, W = np.ones((1, 1, 3, 3), np.float32), np.ones((1, 1, 2, 2), np.float32)
HEALTH_S = 10.0
"""Within a second usually, within two where gRPC had to refuse a first connection, and the slack of a busy machine."""


@contextmanager
def limited(directory: Path, descriptors_count: int) -> Iterator[ServerProcess]:
    listen = ("unix", "127.0.0.1:0")
    with server_process(directory, listen=listen, descriptors_count=descriptors_count) as server:
        yield server


def health_s(target: str) -> float:
    """Return after how many seconds a client that has no connection knows that the server serves."""
    begin_s = time.monotonic()
    while True:
        assert time.monotonic() - begin_s < 30, "health is not answered"
        with grpc.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            with suppress(grpc.RpcError):
                response = stub.Check(health_pb2.HealthCheckRequest(), timeout=1)
                assert response.status == health_pb2.HealthCheckResponse.SERVING
                return time.monotonic() - begin_s


def connect_to(address: str | tuple[str, int], count: int, stack: ExitStack) -> None:
    """Begin so many connections, whether the server gets to accept them or not."""
    family = socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX
    for _ in range(count):
        one = stack.enter_context(socket.socket(family))
        one.setblocking(False)
        one.connect_ex(address)


@pytest.mark.parametrize(("limit_count", "count"), [(64, 66), (64, 1000), (256, 1000)])
@pytest.mark.parametrize("kind", ["grpc", "direct"])
def test_health_is_answered_however_many_connections_there_are(
    tmp_path: Path, limit_count: int, count: int, kind: str
) -> None:
    with limited(tmp_path, limit_count) as server, ExitStack() as stack:
        host, _, port = server.targets[1].rpartition(":")
        address = (host, int(port) if kind == "grpc" else get_server_info(server).direct_port)
        connect_to(address, count, stack)

        assert health_s(server.targets[1]) < HEALTH_S
        assert health_s(server.target) < HEALTH_S
        with deconvd_client.connect(server.target) as F:
            for _ in range(3):
                assert F.deconvolution_2d(X, W).shape == (1, 1, 4, 4)
        assert "Traceback" not in server.log.read_text()


def test_connections_to_unix_sockets_are_found_too(tmp_path: Path) -> None:
    with limited(tmp_path, 64) as server, ExitStack() as stack:
        connect_to(os.fspath(calls_path(server)), 200, stack)
        connect_to(server.target.removeprefix("unix:"), 200, stack)

        assert health_s(server.target) < HEALTH_S
        assert health_s(server.targets[1]) < HEALTH_S


def test_a_soft_limit_is_raised_to_the_hard_one(tmp_path: Path) -> None:
    script = "import resource, sys; from deconvd_server.resources.descriptors import raise_limit; "
    script += "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 200)); print(raise_limit())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "200\n"


def test_a_server_that_may_have_too_few_says_so(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "deconvd_server", "--device", "cpu"]
    command = ["sh", "-c", 'ulimit -n 40 && exec "$@"', "sh", *words, "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "deconvd-server: this process may have at most 40 file descriptors (ulimit -n), and a server "
        "needs at least 48\n"
    )


def test_a_busy_connection_is_not_the_one_that_goes(tmp_path: Path) -> None:
    with limited(tmp_path, 128) as server, ExitStack() as stack:
        host, _, port = server.targets[1].rpartition(":")
        with deconvd_client.connect(server.targets[1], transport="tcp") as F:
            for _ in range(8):
                connect_to((host, int(port)), 20, stack)
                assert F.deconvolution_2d(X, W).shape == (1, 1, 4, 4)
        assert process_resources(server.process.pid).descriptors_count <= 128


def test_those_of_the_peer_that_has_most_go_first_and_of_these_the_idle() -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        accepted = []
        for host in ["127.0.0.2", "127.0.0.1", "127.0.0.1", "127.0.0.1"]:
            client = socket.create_connection(listener.getsockname(), source_address=(host, 0))
            stack.enter_context(client)
            accepted.append(stack.enter_context(listener.accept()[0]))
            time.sleep(0.05)  # the kernel counts in milliseconds how long each has been idle
        accepted[1].send(b"it is not idle")
        descriptors = [one.fileno() for one in accepted]

        guard = DescriptorGuard()
        found = [one for one in guard._connections() if one.descriptor in descriptors]
        chosen = _longest_idle(found, 2)

        assert [one.descriptor for one in chosen] == [descriptors[2], descriptors[3]]
        reused, other = socket.socketpair()
        with reused, other:
            os.dup2(reused.fileno(), descriptors[2])
            for one in chosen:
                guard._shut(one)  # nothing of what has the first one's number now
            reused.send(b"still there")
        assert accepted[3].recv(1) == b""
