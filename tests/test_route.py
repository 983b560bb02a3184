"""The client finds the nearest way to its server, and falls back from it."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import (
    CallCancelledError,
    Connection,
    ExhaustedError,
    InvalidArgumentError,
    UnavailableError,
)
from deconvd_client.calls.deadline import Deadline
from tests.interrupts import interrupt_everywhere
from tests.lenders import is_in_shared_memory
from tests.processes import wait_until
from tests.servers import ServerProcess, call_until_served, only_server, server_process

pytestmark = pytest.mark.usefixtures("patient")

X = np.ones((1, 2, 3, 3), np.float32)
W = np.ones((2, 2, 2, 2), np.float32)
LARGE = np.ones((4, 2, 64, 64), np.float32)


@pytest.fixture
def server(socket_directory: Path) -> Iterator[ServerProcess]:
    with server_process(
        socket_directory, "--log-level", "debug", listen=("127.0.0.1:0", "unix")
    ) as running:
        yield running


def test_calls_to_a_server_on_this_host_go_by_its_unix_socket(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target) as F:
        F.deconvolution_2d(X, W)

    assert "Deconvolve from unix:" in server.log.read_text()
    assert "Deconvolve from ipv4:" not in server.log.read_text()


def test_tcp_stays_tcp_where_there_are_nearer_ways(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target, transport="tcp") as F:
        F.deconvolution_2d(X, W)
        assert not is_in_shared_memory(F.deconvolution_2d(LARGE, W))

    log = server.log.read_text()
    assert "Deconvolve from ipv4:" in log or "Deconvolve from tcp:" in log
    assert "from unix:" not in log


@pytest.mark.parametrize("index", [0, 1], ids=["tcp", "unix"])
def test_grpc_stays_at_the_target_and_has_nothing_beside_it(
    server: ServerProcess, index: int
) -> None:
    with deconvd_client.connect(server.targets[index], transport="grpc") as F:
        for x in (X, LARGE):
            assert not is_in_shared_memory(F.deconvolution_2d(x, W))
        assert not is_in_shared_memory(F.empty(LARGE.shape, LARGE.dtype))

    log = server.log.read_text()
    assert ("Deconvolve from ipv4:" in log, "Deconvolve from unix:" in log) == (
        not index,
        bool(index),
    )
    assert "Deconvolve from tcp:" not in log  # as direct calls are logged
    assert "Deconvolve from unix: process" not in log


@pytest.mark.parametrize("index", [0, 1], ids=["found", "named"])
def test_unix_stays_a_unix_socket_where_memory_is_lent(server: ServerProcess, index: int) -> None:
    with deconvd_client.connect(server.targets[index], transport="unix") as F:
        F.deconvolution_2d(X, W)
        assert not is_in_shared_memory(F.deconvolution_2d(LARGE, W))
        assert not is_in_shared_memory(F.empty(LARGE.shape, LARGE.dtype))

    assert "Deconvolve from unix:" in server.log.read_text()
    assert "Deconvolve from ipv4:" not in server.log.read_text()


@pytest.mark.parametrize("index", [0, 1], ids=["tcp", "unix"])
def test_shared_memory_has_all_large_tensors(server: ServerProcess, index: int) -> None:
    with deconvd_client.connect(server.targets[index], transport="shared_memory") as F:
        y = F.deconvolution_2d(LARGE, W)
        gradients = F.deconvolution_2d_grad(LARGE, W, None, y)
        assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)

    assert is_in_shared_memory(y)
    assert gradients.gx is not None
    assert is_in_shared_memory(gradients.gx)


def test_a_unix_socket_that_the_server_does_not_have_is_said_and_looked_for_again(
    socket_directory: Path,
) -> None:
    with server_process(socket_directory, listen=("127.0.0.1:0",)) as running:
        target = running.target
        with deconvd_client.connect(target, transport="unix", timeout_s=20) as F:
            with pytest.raises(
                UnavailableError, match=r"'unix' cannot be used: .* at no Unix socket"
            ):
                F.deconvolution_2d(X, W)
            running.end()
            with server_process(socket_directory, listen=(target, "unix")):
                assert call_until_served(F, X, W).shape == (1, 2, 4, 4)


def test_a_unix_socket_of_another_host_is_said(
    server: ServerProcess, socket_directory: Path
) -> None:
    (socket_directory / "deconvd.sock").unlink()  # as seen from elsewhere
    with (
        deconvd_client.connect(server.target, transport="unix") as F,
        pytest.raises(
            UnavailableError,
            match=r"\(.*\) exists on this host\. The server is on another host or in a container\.",
        ),
    ):
        F.deconvolution_2d(X, W)


def test_a_unix_socket_of_another_server_is_said(
    server: ServerProcess, socket_directory: Path
) -> None:
    path = socket_directory / "deconvd.sock"
    path.unlink()
    elsewhere = socket_directory / "other"
    elsewhere.mkdir()
    with server_process(elsewhere, listen=(f"unix:{path}",)):
        with deconvd_client.connect(server.target, transport="unix") as F:
            with pytest.raises(UnavailableError, match="another server answers at"):
                F.deconvolution_2d(X, W)


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix"])
def test_memory_that_is_not_lent_is_said_and_nothing_large_is_sent(
    socket_directory: Path, listen: str, caplog: pytest.LogCaptureFixture
) -> None:
    none = ("--shared-memory-bytes", "0")
    with (
        caplog.at_level(logging.INFO),
        server_process(socket_directory, *none, listen=(listen,)) as running,
        deconvd_client.connect(running.target, transport="shared_memory") as F,
    ):
        for _ in range(2):
            with pytest.raises(UnavailableError, match="'shared_memory' cannot be used: "):
                F.deconvolution_2d(LARGE, W)
        assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)

    assert not caplog.records


def test_memory_over_the_quota_is_said_and_nothing_large_is_sent(socket_directory: Path) -> None:
    little = ("--shared-memory-bytes", str(1 << 20))
    with (
        server_process(socket_directory, *little) as running,
        deconvd_client.connect(running.target, transport="shared_memory") as F,
        pytest.raises(ExhaustedError, match=r"'shared_memory' cannot be used: .* lends no more"),
    ):
        F.deconvolution_2d(np.ones((2, 2, 512, 512), np.float32), W)


def test_a_successors_memory_is_found_wherever_it_lends(tmp_path: Path) -> None:
    with server_process(tmp_path, listen=("127.0.0.1:0",)) as gone:
        target = gone.target
        F = deconvd_client.connect(target, transport="shared_memory", timeout_s=20)
        assert is_in_shared_memory(F.deconvolution_2d(LARGE, W))
        gone.end(signal.SIGKILL)
    with F, server_process(tmp_path, listen=(target,)):
        assert is_in_shared_memory(call_until_served(F, LARGE, W))


def test_tcp_to_a_unix_socket_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="transport tcp must have a target of the form"):
        deconvd_client.connect("unix:deconvd.sock", transport="tcp")


def test_a_socket_where_another_server_answers_is_left_alone(
    server: ServerProcess, socket_directory: Path
) -> None:
    path = socket_directory / "deconvd.sock"
    path.unlink()
    elsewhere = socket_directory / "other"
    elsewhere.mkdir()
    options = ("--log-level", "debug")
    with server_process(elsewhere, *options, listen=(f"unix:{path}",)) as other:
        with deconvd_client.connect(server.target) as F:
            F.deconvolution_2d(X, W)

        assert "GetServerInfo from unix:" in other.log.read_text()
        assert "Deconvolve" not in other.log.read_text()


def test_a_socket_that_goes_is_left_for_the_target_with_one_line(
    server: ServerProcess, socket_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    successor = socket_directory / "successor"
    successor.mkdir()
    with deconvd_client.connect(server.target, timeout_s=20) as F, caplog.at_level(logging.WARNING):
        F.deconvolution_2d(X, W)
        server.end(signal.SIGKILL)
        with server_process(successor, listen=(server.target,)):
            for _ in range(3):
                assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)

    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "the server's Unix socket is gone" in lines[0]


@pytest.mark.parametrize("transport", ["auto", "unix"])
def test_a_socket_that_does_not_answer_at_first_is_taken_once_it_does(
    server: ServerProcess, socket_directory: Path, transport: str
) -> None:
    path = socket_directory / "deconvd.sock"
    aside = path.rename(socket_directory / "aside.sock")

    def answer_again() -> None:
        time.sleep(2)  # as long as a probe waits for an answer
        aside.replace(path)

    with socket.socket(socket.AF_UNIX) as silent, ThreadPoolExecutor(1) as pool:
        silent.bind(str(path))
        silent.listen()
        pool.submit(answer_again)
        with deconvd_client.connect(server.target, transport=transport, timeout_s=20) as F:
            assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
            wait_until(lambda: only_server(F).route._near_stub is not None)


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(
        InvalidArgumentError, match="transport must be one of auto, shared_memory, unix, tcp"
    ):
        deconvd_client.connect("gpu-host:50051", transport="pigeon")


def test_a_target_without_a_server_is_said_and_looked_at_again(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd_client.transports.retry_policy._FIRST_CONTACT_TIMEOUT_S", 0.5)
    with server_process(socket_directory, listen=("127.0.0.1:0",)) as gone:
        target = gone.target
    with deconvd_client.connect(target, timeout_s=20) as F:
        with pytest.raises(UnavailableError):
            F.deconvolution_2d(X, W)
        with server_process(socket_directory, listen=(target, "unix")):
            assert call_until_served(F, X, W).shape == (1, 2, 4, 4)
            wait_until(lambda: is_near(F))


def is_near(F: Connection) -> bool:
    """Make a call, and return whether it has found a socket of this host, which may take longer than a call."""
    assert F.deconvolution_2d(X, W).shape == (1, 2, 4, 4)
    return only_server(F).route._near_stub is not None


@pytest.mark.parametrize("transport", ["auto", "unix"])
def test_closing_waits_for_no_server_that_says_nothing(transport: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor(2) as pool:
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        F = deconvd_client.connect(target, transport=transport, timeout_s=90)
        calling = pool.submit(F.deconvolution_2d, X, W)
        connection, _ = silent.accept()

        pool.submit(F.close).result(timeout=30)

        with pytest.raises(CallCancelledError):
            calling.result(timeout=30)
        connection.close()


def test_a_connection_that_breaks_as_it_is_closed_stays_closed(
    server: ServerProcess, caplog: pytest.LogCaptureFixture
) -> None:
    F = deconvd_client.connect(server.target, timeout_s=20)
    F.deconvolution_2d(X, W)

    def close_and_lose(_stub: object) -> None:
        F.close()
        raise UnavailableError("the server has gone")

    nearest = only_server(F).route
    with caplog.at_level(logging.WARNING), contextlib.suppress(UnavailableError):
        nearest.call_once(close_and_lose, Deadline(20))

    assert not caplog.records
    with pytest.raises(CallCancelledError):
        F.deconvolution_2d(X, W)
    assert nearest._state.value == "closed"


def test_a_way_is_looked_for_wherever_an_interrupt_strikes_as_it_is_lost(
    server: ServerProcess,
) -> None:
    with deconvd_client.connect(server.target, timeout_s=20) as F:
        F.deconvolution_2d(X, W)
        nearest = only_server(F).route

        def lose() -> None:
            near = nearest._near_stub
            assert near is not None
            nearest._lose(near, UnavailableError("its connection broke"))

        for _ in interrupt_everywhere(lose):
            wait_until(lambda: nearest._near_stub is not None)
