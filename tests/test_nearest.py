"""The client finds the nearest way to its server, and falls back from it."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import InvalidArgumentError
from tests.servers import ServerProcess, call_until_served, server_process

X = np.ones((1, 2, 3, 3), np.float32)
W = np.ones((2, 2, 2, 2), np.float32)


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


def test_a_pinned_transport_stays_with_its_target(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target, transport="target") as F:
        F.deconvolution_2d(X, W)

    assert "Deconvolve from ipv4:" in server.log.read_text()
    assert "from unix:" not in server.log.read_text()


def test_a_socket_where_another_server_answers_is_left_alone(
    server: ServerProcess, socket_directory: Path
) -> None:
    socket = socket_directory / "deconvd.sock"
    socket.unlink()
    elsewhere = socket_directory / "other"
    elsewhere.mkdir()
    options = ("--log-level", "debug")
    with server_process(elsewhere, *options, listen=(f"unix:{socket}",)) as other:
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


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="transport must be one of auto, target"):
        deconvd_client.connect("gpu-host:50051", transport="pigeon")


def test_a_target_without_a_server_is_said_and_looked_at_again(socket_directory: Path) -> None:
    with server_process(socket_directory, listen=("127.0.0.1:0",)) as gone:
        target = gone.target
    with deconvd_client.connect(target, timeout_s=20) as F:
        with pytest.raises(deconvd_client.UnavailableError):
            F.deconvolution_2d(X, W)
        with server_process(socket_directory, listen=(target, "unix")):
            assert call_until_served(F, X, W).shape == (1, 2, 4, 4)
            assert F._nearest._near is not None
