"""Direct connections with TLS and tokens to a server as operators start it: a process with files that they replace."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import StripedCallHead
from deconvd.direct.frame_stream import FrameStream
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client import Tls
from deconvd_client.credentials import Credentials
from deconvd_client.transports.direct.connectors import TcpConnector
from deconvd_server.access.tokens import TokenHash, new_token
from tests.certificates import Authority, CertificateFiles
from tests.direct_calls import is_serving
from tests.processes import wait_until
from tests.servers import server_process
from tests.striped_clients import (
    LARGE,
    SMALL_PIECES,
    TWICE,
    force_stripes,
    shrink_pieces,
    wait_until_direct,
    watch_heads,
)

QUICK = {
    **SMALL_PIECES,
    "deconvd.host.watched_files:_CHECK_PERIOD_S": 0.02,
    "deconvd_server.access.caller_pass:_CHECK_PERIOD_S": 0.02,
}
DAY_S = 24 * 60 * 60


class Operated:
    """A server with TLS, an authority of clients, and tokens.

    Attributes:
        target: Its address.
    """

    def __init__(self, target: str, client_ca: Path, tokens: Path) -> None:
        self.target = target
        self._client_ca = client_ca
        self._tokens = tokens
        self._lines: dict[str, TokenHash] = {}

    def let(self, token: str, begin_s: float = -math.inf, end_s: float = math.inf) -> None:
        """Have a token valid from one time to another, on the wall clock."""
        of_token = TokenHash.of("alice", token)
        self._lines[token] = of_token._replace(not_before_s=begin_s, not_after_s=end_s)
        lines = [f"{line.as_line()}\n" for line in self._lines.values()]
        _replace(self._tokens, "".join(lines).encode())

    def trust(self, *authorities: Authority) -> None:
        """Take clients' certificates of these authorities alone."""
        _replace(self._client_ca, b"".join(one.ca.read_bytes() for one in authorities))

    def find_direct_port(self, tls: Tls, token: str) -> pb.GetServerInfoResponse:
        """Return what tells a connector where direct connections are accepted."""
        with deconvd_client.connect(self.target, tls=tls, token=token, transport="grpc") as F:
            info = F.server_info()
        return pb.GetServerInfoResponse(direct_port=info.direct_port, instance_id=info.instance_id)


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_suffix(".new")
    staged.write_bytes(data)
    staged.chmod(0o600)
    os.replace(staged, path)


@pytest.fixture(scope="module")
def operated(
    authority: Authority,
    loopback_certificate: CertificateFiles,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Operated]:
    """A process that has been started with all options for credentials."""
    directory = tmp_path_factory.mktemp("operated")
    client_ca, tokens = directory / "client-ca.pem", directory / "tokens"
    operated = Operated("", client_ca, tokens)
    operated.trust(authority)
    tokens.touch(0o600)
    options = {
        "--tls-cert": loopback_certificate.cert,
        "--tls-key": loopback_certificate.key,
        "--tls-client-ca": client_ca,
        "--tokens": tokens,
    }
    words = [word for option, path in options.items() for word in (option, str(path))]
    with server_process(directory, *words, listen=("127.0.0.1:0",), constants=QUICK) as server:
        operated.target = server.target
        yield operated


def open_stream(info: pb.GetServerInfoResponse, tls: Tls, token: str) -> FrameStream:
    """Return a direct connection. Raises OSError if it is refused."""
    stream = TcpConnector("127.0.0.1", Credentials(lambda: token, tls)).connect(lambda: info, 30)
    stream.set_deadline(60)
    return stream


def is_served(info: pb.GetServerInfoResponse, tls: Tls, token: str) -> bool:
    with suppress(ConnectionBrokenError), open_stream(info, tls, token) as stream:
        return is_serving(stream)
    return False


@pytest.fixture(scope="module")
def tls(authority: Authority) -> Tls:
    client = authority.issue("client.example")
    return Tls(authority.ca, client.cert, client.key)


@pytest.fixture(scope="module")
def token(operated: Operated, tls: Tls) -> str:
    """A token that is valid all the time."""
    token = new_token()
    operated.let(token)
    with deconvd_client.connect(operated.target, tls=tls, token=token, transport="grpc") as F:
        wait_until(lambda: is_known(F))
    return token


@pytest.fixture
def info(operated: Operated, tls: Tls, token: str) -> pb.GetServerInfoResponse:
    return operated.find_direct_port(tls, token)


def test_calls_are_striped_with_tls_and_a_token(
    operated: Operated, tls: Tls, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_stripes(monkeypatch, 2)
    shrink_pieces(monkeypatch)
    heads = watch_heads(monkeypatch)
    with deconvd_client.connect(operated.target, tls=tls, token=token, transport="tcp") as F:
        wait_until_direct(F, heads)
        np.testing.assert_array_equal(F.deconvolution_2d(LARGE, TWICE), 2 * LARGE)
        assert [type(head) for head in heads] == [StripedCallHead]


def test_a_token_counts_in_its_time_alone(
    operated: Operated, info: pb.GetServerInfoResponse, tls: Tls, token: str
) -> None:
    early, late, last = new_token(), new_token(), new_token()
    now_s = time.time()
    operated.let(late, end_s=now_s - DAY_S)
    operated.let(early, now_s + DAY_S)
    operated.let(last)
    wait_until(lambda: is_served(info, tls, last))  # so the server has read the other lines, too
    assert is_served(info, tls, token)
    for wrong in (early, late, new_token()):
        assert not is_served(info, tls, wrong)

    operated.let(early, time.time() + 1)
    wait_until(lambda: is_served(info, tls, early))
    with open_stream(info, tls, early) as stream:
        assert is_serving(stream)
        operated.let(early, now_s, time.time() + 1)
        assert stream.poll(60)  # the server ends the connection, though nothing is called
        with pytest.raises(ConnectionBrokenError):
            is_serving(stream)
    assert not is_served(info, tls, early)


def test_the_authority_of_clients_is_replaced(
    operated: Operated,
    info: pb.GetServerInfoResponse,
    authority: Authority,
    tls: Tls,
    token: str,
    tmp_path: Path,
) -> None:
    successor = Authority(tmp_path)
    other = successor.issue("client.example")
    other_tls = Tls(authority.ca, other.cert, other.key)
    for wrong in (other_tls, Tls(authority.ca)):
        assert not is_served(info, wrong, token)

    with open_stream(info, tls, token) as stream:
        operated.trust(authority, successor)
        wait_until(lambda: is_served(info, other_tls, token))
        assert is_served(info, tls, token)
        operated.trust(successor)
        wait_until(lambda: not is_served(info, tls, token))
        assert is_served(info, other_tls, token)
        assert is_serving(stream)  # connections that are open go on
    operated.trust(authority)
    wait_until(lambda: is_served(info, tls, token))


def is_known(F: deconvd_client.Connection) -> bool:
    """Return whether the server knows the client's token by now."""
    with suppress(deconvd_client.UnauthenticatedError):
        return F.health() == "SERVING"
    return False
