"""HTTP proxies in the environment: never between two ends on one host, and named where they are in the way."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest

import deconvd_client
from deconvd_client import UnavailableError
from tests.servers import ServerProcess, server_process

X = np.ones((1, 4, 8, 8), np.float32)
W = np.ones((4, 1, 3, 3), np.float32)
pytestmark = pytest.mark.usefixtures("impatient")

VARIABLES = ["grpc_proxy", "https_proxy", "http_proxy"]


class Proxy:
    """An HTTP proxy that notes what it is asked for, and refuses it or leaves it without an answer."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = True
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        held: list[socket.socket] = []
        with suppress(OSError):  # the listener was closed
            while True:
                connection, _ = self._listener.accept()
                self.asked.append(connection.recv(4096).decode().split("\r\n")[0])
                if self.answers:
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                    connection.close()
                held.append(connection)
        for connection in held:
            connection.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for variable in [*VARIABLES, "no_grpc_proxy", "no_proxy"]:
        monkeypatch.delenv(variable, raising=False)
    proxy = Proxy()
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    listen = ("127.0.0.1:0", "unix")
    with server_process(tmp_path_factory.mktemp("server"), listen=listen) as running:
        yield running


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("transport", ["auto", "tcp", "grpc"])
@pytest.mark.parametrize(
    "form",
    ["127.0.0.1", "localhost", "LocalHost", "dns:///localhost", "ipv4:127.0.0.1", "127.1.2.3"],
)
def test_no_call_to_a_loopback_address_goes_by_a_proxy(
    tcp_server: ServerProcess,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    transport: str,
    form: str,
) -> None:
    if form == "127.1.2.3":  # where nobody listens: the error comes from there, not from a proxy
        _, port = form, "9"
    else:
        port = tcp_server.target.rpartition(":")[2]
    monkeypatch.setenv(variable, f"http://{proxy.address}")

    with deconvd_client.connect(f"{form}:{port}", timeout_s=20, transport=transport) as F:
        if port == "9":
            with pytest.raises(UnavailableError, match="onnection refused"):
                F.server_info()
        else:
            assert F.deconvolution_2d(X, W).shape == (1, 1, 10, 10)
            np.testing.assert_array_equal(F.put(X).numpy(), X)

    assert proxy.asked == []


@pytest.mark.parametrize("target", ["[::1]:9", "ipv6:[::1]:9", "[::ffff:127.0.0.1]:9", "[::]:9"])
def test_no_call_to_a_loopback_address_of_ipv6_goes_by_a_proxy(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")

    with deconvd_client.connect(target) as F, pytest.raises(UnavailableError):
        F.server_info()

    assert proxy.asked == []


def test_no_call_to_a_unix_socket_goes_by_a_proxy(
    tcp_server: ServerProcess, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")

    with deconvd_client.connect(tcp_server.targets[1]) as F:
        F.deconvolution_2d(X, W)

    assert proxy.asked == []


def test_a_health_check_on_the_servers_host_goes_by_no_proxy(
    tcp_server: ServerProcess, proxy: Proxy
) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "deconvd_client.cli", "status", "--target", tcp_server.target],
        env=os.environ | {"http_proxy": f"http://{proxy.address}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert proxy.asked == []


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_proxy_that_refuses_is_named_without_its_password(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, f"http://user:secret@{proxy.address}")

    with (
        deconvd_client.connect("gpu-host.invalid:50051", timeout_s=5) as F,
        pytest.raises(
            UnavailableError,
            match=rf"the proxy {proxy.address} "
            rf"\(from the environment variable {variable}\)\. To connect directly",
        ) as e,
    ):
        F.server_info()

    assert proxy.asked[0] == "CONNECT gpu-host.invalid:50051 HTTP/1.1"
    assert "secret" not in str(e.value)


def test_a_proxy_that_does_not_answer_is_named(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.answers = False
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")

    with (
        deconvd_client.connect("gpu-host.invalid:50051", timeout_s=1) as F,
        pytest.raises(
            deconvd_client.DeconvdError,
            match=rf"the proxy {proxy.address} \(from the environment variable http_proxy\)",
        ),
    ):
        F.server_info()


@pytest.mark.parametrize(
    ("environment", "is_asked"),
    [
        ({"http_proxy": "P", "no_proxy": "other,gpu-host.invalid"}, False),
        ({"http_proxy": "P", "no_proxy": " .INVALID"}, False),
        ({"http_proxy": "P", "no_grpc_proxy": "other", "no_proxy": "gpu-host.invalid"}, True),
        ({"http_proxy": "P", "no_proxy": "other"}, True),
        ({"http_proxy": "P", "no_proxy": ""}, True),
        ({"http_proxy": "P", "grpc_proxy": ""}, False),
        ({"http_proxy": "socks5://127.0.0.1:9", "no_proxy": ""}, False),
        ({"HTTP_PROXY": "P", "all_proxy": "P"}, False),
    ],
    ids=str,
)
def test_the_error_names_a_proxy_exactly_if_it_was_asked(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_asked: bool
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, f"http://{proxy.address}" if value == "P" else value)

    with (
        deconvd_client.connect("gpu-host.invalid:50051", timeout_s=5) as F,
        pytest.raises(UnavailableError) as raised,
    ):
        F.server_info()

    assert bool(proxy.asked) == is_asked
    assert bool(re.search("used the proxy", str(raised.value))) == is_asked


def test_a_network_can_be_excepted(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
    monkeypatch.setenv("no_proxy", "192.0.2.0/24")  # addresses for documentation: nobody is there

    with (
        deconvd_client.connect("192.0.2.7:50051", timeout_s=1) as F,
        pytest.raises(deconvd_client.DeconvdError) as raised,
    ):
        F.server_info()

    assert proxy.asked == []
    assert "used the proxy" not in str(raised.value)
