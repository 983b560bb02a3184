"""What a connection's text says of its server: which way calls go, and what is open."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection
from tests.direct_calls import W, X, target_of
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process, stop_server

pytestmark = pytest.mark.usefixtures("patient")

LARGE = np.ones((4, 2, 64, 64), np.float32)


@pytest.fixture
def running(socket_directory: Path) -> Iterator[ServerProcess]:
    with server_process(socket_directory, listen=("unix", "127.0.0.1:0")) as server:
        yield server


def words(F: Connection) -> list[str]:
    """Return what the text of a connection says between its target and its options."""
    found = re.fullmatch(r"<deconvd_client\.Connection to \S+, (.*)timeout 20 s(, .*)?>", repr(F))
    assert found is not None, repr(F)
    return found[1].split(", ")[:-1]


def until_said(F: Connection, word: str) -> None:
    """Call until a connection's text has a word: the first calls may come before there is a line."""
    wait_until(lambda: F.deconvolution_2d(X, W).size > 0 and word in words(F))


def test_nothing_is_said_before_the_first_call() -> None:
    with deconvd_client.connect("gpu-host:50051", timeout_s=20) as F:
        assert words(F) == []


@pytest.mark.parametrize(
    ("transport", "way"), [("auto", "a Unix socket"), ("unix", "a Unix socket"), ("tcp", "TCP")]
)
def test_the_way_and_direct_connections_are_said(
    running: ServerProcess, transport: str, way: str
) -> None:
    with deconvd_client.connect(running.targets[1], transport=transport, timeout_s=20) as F:
        until_said(F, "1 direct connection")
        assert words(F) == [f"by {way}", "1 direct connection"]


def test_gRPC_alone_is_said(running: ServerProcess) -> None:
    with deconvd_client.connect(running.targets[1], transport="grpc", timeout_s=20) as F:
        F.deconvolution_2d(X, W)
        assert words(F) == ["by TCP", "gRPC alone"]


def test_shared_memory_and_a_session_are_said(running: ServerProcess) -> None:
    with deconvd_client.connect(running.targets[1], timeout_s=20) as F:
        with F.put(W):
            until_said(F, "1 direct connection")
            F.deconvolution_2d(LARGE, W[:2])
            assert words(F) == [
                "by shared memory and a Unix socket",
                "1 direct connection",
                "session open",
            ]


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_busy_connections_are_said_of_a_server_that_says_nothing(
    running: ServerProcess, transport: str
) -> None:
    target = target_of(running, transport)
    with (
        deconvd_client.connect(target, transport=transport, timeout_s=20) as F,
        ThreadPoolExecutor(1) as pool,
    ):
        until_said(F, "1 direct connection")
        with stop_server(running):
            calling = pool.submit(F.deconvolution_2d, X, W)
            wait_until(lambda: "1 direct connection (1 busy)" in words(F))
        calling.result(timeout=30)
        assert "1 direct connection" in words(F)


def test_that_it_is_closed_is_said(running: ServerProcess) -> None:
    F = deconvd_client.connect(running.targets[1], timeout_s=20)
    F.deconvolution_2d(X, W)
    F.close()
    assert words(F) == ["closed"]


def test_what_is_left_of_a_lost_socket_is_said(
    running: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    with deconvd_client.connect(running.targets[1], timeout_s=20) as F:
        F.deconvolution_2d(X, W)
        assert words(F)[0] == "by a Unix socket"
        running.end(9)
        with server_process(running.log.parent, listen=(running.targets[1],)):
            F.deconvolution_2d(X, W)
            assert words(F)[0] == "by TCP"
    assert "Unix socket is gone" in caplog.text
