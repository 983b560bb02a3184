"""What errors say: which server was asked, which limit was met, and which option changes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection, DeadlineError, UnavailableError
from tests.servers import ServerProcess, free_port, server_process, stop_server

X = np.ones((1, 4, 8, 8), np.float32)
LARGE_X = np.ones((16, 4, 200, 200), np.float32)  # over 4 MiB: sent in a stream
W = np.ones((4, 1, 3, 3), np.float32)
CALLS: dict[str, Callable[[Connection], object]] = {
    "message": lambda F: F.deconvolution_2d(X, W),
    "stream": lambda F: F.deconvolution_2d(LARGE_X, W),
    "server_info": lambda F: F.server_info(),
    "health": lambda F: F.health(),
}


@pytest.fixture(scope="module")
def two_ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    listen = ("127.0.0.1:0", "unix")
    with server_process(tmp_path_factory.mktemp("server"), listen=listen) as running:
        yield running


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(("index", "transport"), [(0, "tcp"), (0, "grpc"), (1, "unix")])
def test_a_deadline_names_the_limit_and_the_options(
    two_ways: ServerProcess, name: str, index: int, transport: str
) -> None:
    target = two_ways.targets[index]
    with deconvd_client.connect(target, timeout_s=0.75, transport=transport) as F:
        F.deconvolution_2d(X, W)
        with stop_server(two_ways), pytest.raises(DeadlineError) as raised:
            CALLS[name](F)

    message = str(raised.value)
    assert "longer than the 0.75 s that timeout_s of connect() allows" in message
    assert "--timeout-s of the command" in message
    assert "Deadline Exceeded" not in message


@pytest.mark.usefixtures("impatient")
def test_nobody_at_a_port_is_asked_after() -> None:
    target = f"127.0.0.1:{free_port()}"

    with deconvd_client.connect(target) as F, pytest.raises(UnavailableError) as raised:
        F.deconvolution_2d(X, W)

    assert f"is deconvd-server running at {target}?" in str(raised.value)
    assert "Connection refused" in str(raised.value)


@pytest.mark.usefixtures("impatient")
def test_nobody_at_a_socket_is_asked_after(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/deconvd.sock"

    with deconvd_client.connect(target) as F, pytest.raises(UnavailableError) as raised:
        F.health()

    assert f"is deconvd-server running at {target}?" in str(raised.value)
    assert "No such file or directory" in str(raised.value)


@pytest.mark.usefixtures("impatient")
def test_a_host_that_has_no_address_is_asked_after() -> None:
    with (
        deconvd_client.connect("gpu-host.invalid:50051") as F,
        pytest.raises(UnavailableError, match=r"running at gpu-host.invalid:50051\?"),
    ):
        F.server_info()
