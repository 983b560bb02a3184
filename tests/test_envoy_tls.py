"""The Envoy of docs/envoy.yaml: it ends TLS beside the server, and lets nobody through who has no token."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.wire.grpc_status import error_from_rpc
from deconvd_client import Tls
from deconvd_client.credentials import Credentials
from tests.certificates import Authority, CertificateFiles
from tests.envoys import run_documented_envoy
from tests.servers import ServerProcess, server_process
from tests.session_clients import open_session
from tests.token_calls import write_tokens

pytest.importorskip("envoy", reason="there is no Envoy for this system")

ONE = np.ones((1, 1, 1, 1), np.float32)
METHOD = "/deconvd.v1.DeconvolutionService/GetServerInfo"
LARGE = np.ones((16, 1, 512, 512), np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    tokens = write_tokens(directory / "tokens", {"dcd_alice": "alice", "dcd_bob": "bob"})
    with server_process(directory, "--tokens", str(tokens)) as running:
        yield running


@pytest.fixture(scope="module")
def port(
    server: ServerProcess,
    loopback_certificate: CertificateFiles,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[int]:
    """The port of an Envoy that runs with the file of the documents."""
    replacements = {
        "/etc/deconvd/cert.pem": str(loopback_certificate.cert),
        "/etc/deconvd/key.pem": str(loopback_certificate.key),
        "/run/deconvd/deconvd.sock": server.target.removeprefix("unix:"),
    }
    directory = tmp_path_factory.mktemp("envoy")
    with run_documented_envoy(directory, "envoy.yaml", replacements) as address:
        yield int(address.rpartition(":")[2])


def test_calls_with_a_token_are_those_of_its_identity(port: int, authority: Authority) -> None:
    tls = Tls(ca=authority.ca)
    target = f"127.0.0.1:{port}"
    with (
        deconvd_client.connect(target, tls=tls, token="dcd_alice", transport="grpc") as alice,
        deconvd_client.connect(target, tls=tls, token="dcd_bob", transport="grpc") as bob,
    ):
        there = alice.put(LARGE)
        np.testing.assert_array_equal(alice.deconvolution_2d(there, ONE), LARGE)
        np.testing.assert_array_equal(bob.deconvolution_2d(LARGE, ONE), LARGE)


@pytest.mark.parametrize(
    "authorization", [None, "", "Bearer", "Bearer ", "Basic YWxpY2U6", "Bearer dcd_carol"]
)
def test_calls_without_a_valid_token_are_refused(
    port: int, authority: Authority, authorization: str | None
) -> None:
    state = Credentials(str, Tls(ca=authority.ca)).tls_state
    assert state is not None
    channel_credentials = grpc.ssl_channel_credentials(state.ca)
    with grpc.secure_channel(f"127.0.0.1:{port}", channel_credentials) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/deconvd.v1.DeconvolutionService/GetServerInfo"
        )
        metadata = () if authorization is None else (("authorization", authorization),)
        with pytest.raises(grpc.RpcError) as raised:
            call(b"", metadata=metadata, timeout=10)

    assert error_from_rpc(raised.value).status == "UNAUTHENTICATED"


def test_the_socket_itself_needs_no_token(server: ServerProcess) -> None:
    """Which is why the proxy must ask for one."""
    with open_session(server.target) as local:
        local.put(ONE)
