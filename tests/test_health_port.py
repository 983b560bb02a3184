"""Health alone, in plain text and without credentials, on a port of its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deconvd_client
from deconvd_client import Tls
from deconvd_server.daemon import Daemon
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.resources.socket_file import AddressInUseError
from deconvd_server.settings import Settings
from deconvd_server.transports.listen import side_hosts
from tests.certificates import Authority, CertificateFiles
from tests.secured_servers import certified, secured_process
from tests.servers import ServerProcess
from tests.soak.hostile.http2 import HEALTH, REFLECTION, SERVICE, Http2
from tests.token_calls import write_tokens

TOKEN = "a-token-that-probes-do-not-have"
TIMEOUT_S = 30
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CONNECTIONS_COUNT = 64


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, loopback_certificate: CertificateFiles
) -> Iterator[ServerProcess]:
    """A server that serves nobody without a token, and health at its second target."""
    directory = tmp_path_factory.mktemp("server")
    tokens = directory / "tokens"
    write_tokens(tokens, {TOKEN: "team-a"})
    with secured_process(
        directory, tokens=tokens, health_port=0, **certified(loopback_certificate)
    ) as running:
        yield running


def health_stub(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def request(service: str = "") -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


def test_it_tells_whether_the_server_serves_and_nothing_else(guarded: ServerProcess) -> None:
    with grpc.insecure_channel(guarded.targets[1]) as channel:
        health = health_stub(channel)
        for service in ("", "deconvd.v1.DeconvolutionService"):
            assert health.Check(request(service), timeout=TIMEOUT_S).status == SERVING
        codes = []
        for path in (f"{SERVICE}GetServerInfo", f"{SERVICE}HoldSession", REFLECTION):
            call: Any = channel.unary_unary(path)
            with pytest.raises(grpc.RpcError) as raised:
                call(b"", timeout=TIMEOUT_S)
            codes.append(raised.value.code())

    assert codes == [grpc.StatusCode.UNIMPLEMENTED] * 3


def test_a_server_is_alive_before_it_is_ready_and_while_it_drains() -> None:
    settings = Settings(["127.0.0.1:0"], 2 << 20, drain_timeout_s=1, health_port=0)
    daemon = Daemon(settings)
    with grpc.insecure_channel(daemon.health_addresses[0]) as channel:
        health = health_stub(channel)

        def statuses() -> tuple[int, int]:
            ready, alive = (
                health.Check(request(service), timeout=TIMEOUT_S).status
                for service in ("", "liveness")
            )
            return ready, alive

        found = [statuses()]
        daemon.serve(lambda: [CpuDevice(1)])
        found.append(statuses())
        daemon.fail()
        found.append(statuses())
        daemon.drain()

    assert found == [(NOT_SERVING, SERVING), (SERVING, SERVING), (NOT_SERVING, SERVING)]


def test_a_watch_hears_of_a_drain() -> None:
    settings = Settings(["127.0.0.1:0"], 2 << 20, drain_timeout_s=1, health_port=0)
    daemon = Daemon(settings)
    daemon.serve(lambda: [CpuDevice(1)])
    with grpc.insecure_channel(daemon.health_addresses[0]) as channel:
        watch = health_stub(channel).Watch(request(), timeout=TIMEOUT_S)
        statuses = [next(watch).status]
        daemon.drain()
        statuses.append(next(watch).status)

    assert statuses == [SERVING, NOT_SERVING]


def test_the_main_port_still_asks_for_a_token(guarded: ServerProcess, authority: Authority) -> None:
    with (
        deconvd_client.connect(guarded.target, tls=Tls(ca=authority.ca)) as F,
        pytest.raises(deconvd_client.UnauthenticatedError),
    ):
        F.health()


def test_a_large_message_is_not_taken(guarded: ServerProcess) -> None:
    with grpc.insecure_channel(guarded.targets[1]) as channel:
        with pytest.raises(grpc.RpcError) as raised:
            health_stub(channel).Check(request("x" * 5000), timeout=TIMEOUT_S)
        assert health_stub(channel).Check(request(), timeout=TIMEOUT_S).status == SERVING

    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_its_connections_are_bounded_and_the_main_port_does_not_mind(
    guarded: ServerProcess, authority: Authority
) -> None:
    host, _, port = guarded.targets[1].rpartition(":")
    open_count = 0
    with ExitStack() as stack:
        for _ in range(CONNECTIONS_COUNT + 16):
            connection = stack.enter_context(socket.create_connection((host, int(port)), TIMEOUT_S))
            try:
                Http2(connection).begin(f"{HEALTH}Watch")  # and no message ever comes
                open_count += bool(connection.recv(1))
            except ConnectionError:
                pass  # refused
        with deconvd_client.connect(
            guarded.target, tls=Tls(ca=authority.ca), token=TOKEN, timeout_s=TIMEOUT_S
        ) as F:
            assert F.health() == "SERVING"

    assert 0 < open_count <= CONNECTIONS_COUNT


def test_no_connection_keeps_its_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    health_server = "deconvd_server.transports.grpc.health_server"
    monkeypatch.setattr(f"{health_server}._CONNECTION_AGE_S", 0.1)
    monkeypatch.setattr("deconvd_server.transports.grpc.server._LAST_CALLS_S", 0.1)
    daemon = Daemon(Settings(["127.0.0.1:0"], 2 << 20, drain_timeout_s=1, health_port=0))
    try:
        host, _, port = daemon.health_addresses[0].rpartition(":")
        with socket.create_connection((host, int(port)), TIMEOUT_S) as connection:
            Http2(connection).begin(f"{HEALTH}Watch")
            while connection.recv(4096):
                pass
    finally:
        daemon.drain()


@pytest.mark.parametrize(
    ("addresses", "hosts"),
    [
        (["unix:/run/s"], ["127.0.0.1"]),
        (["10.0.0.1:50051", "unix:/run/s", "10.0.0.1:50052"], ["10.0.0.1"]),
        (["localhost:1", "[::1]:1"], ["localhost", "[::1]"]),
        (["0.0.0.0:1", "127.0.0.1:2", "[::1]:1"], ["0.0.0.0", "[::1]"]),
        (["127.0.0.1:2", "[::]:1", "0.0.0.0:1"], ["[::]"]),
    ],
)
def test_it_is_where_the_server_is(addresses: list[str], hosts: list[str]) -> None:
    assert side_hosts(addresses) == hosts


def test_a_port_that_another_has_is_an_error_that_names_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressInUseError, match=rf"\(--health-port\).*127.0.0.1:{port}"):
            Daemon(Settings(["127.0.0.1:0"], 1 << 20, drain_timeout_s=1, health_port=port))


def test_by_unix_sockets_alone_it_is_on_loopback(socket_directory: Path) -> None:
    settings = Settings([f"unix:{socket_directory}/s"], 2 << 20, drain_timeout_s=1, health_port=0)
    daemon = Daemon(settings)
    try:
        (address,) = daemon.health_addresses
        with grpc.insecure_channel(address) as channel:
            health = health_stub(channel)
            before = health.Check(request(), timeout=TIMEOUT_S).status
            daemon.serve(lambda: [CpuDevice(1)])
            after = health.Check(request(), timeout=TIMEOUT_S).status
    finally:
        daemon.drain()

    assert address.startswith("127.0.0.1:")
    assert (before, after) == (NOT_SERVING, SERVING)


def test_without_the_setting_there_is_none(socket_directory: Path) -> None:
    daemon = Daemon(Settings([f"unix:{socket_directory}/s"], 2 << 20, drain_timeout_s=1))
    try:
        assert daemon.health_addresses == []
    finally:
        daemon.drain()
