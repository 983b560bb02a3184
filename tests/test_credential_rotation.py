"""Certificates, keys and tokens that are replaced while calls go on: no call fails. And none of them is ever logged."""

from __future__ import annotations

import datetime
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import deconvd_client
from deconvd_client import Connection, Tls, UnauthenticatedError
from deconvd_server.access.authenticator import Authenticator
from tests.certificates import Authority, CertificateFiles
from tests.fault_proxy import CLEAN, faulty_proxy
from tests.processes import wait_until
from tests.secured_servers import (
    QUICK_S,
    certified,
    health_server,
    secured_process,
    server_tls,
)
from tests.servers import free_port, only_server
from tests.token_calls import write_tokens

OLD, NEW = "dcd_" + "old-token" * 4, "dcd_" + "new-token" * 4
X = np.arange(256, dtype=np.float32).reshape(1, 4, 8, 8)
W = np.ones((4, 1, 3, 3), np.float32)
LARGE_X = np.ones((16, 4, 200, 200), np.float32)  # over 4 MiB: sent in a stream
DAY = datetime.timedelta(days=1)
ROUNDS_COUNT = 3
THREADS_COUNT = 3


def call_once(F: Connection) -> object:
    return F.deconvolution_2d(X, W)


def call_in_a_stream(F: Connection) -> object:
    return F.deconvolution_2d(LARGE_X, W)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", QUICK_S)


@pytest.fixture(scope="module")
def next_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that takes the place of another."""
    return Authority(tmp_path_factory.mktemp("next"))


@pytest.fixture
def both(authority: Authority, next_authority: Authority, tmp_path: Path) -> Path:
    """A file with both authorities."""
    path = tmp_path / "both.pem"
    path.write_bytes(authority.ca.read_bytes() + next_authority.ca.read_bytes())
    return path


class Load:
    """Threads that do one thing again and again.

    Attributes:
        errors: What they have raised.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._work = work
        self._has_ended = False
        self._lock = threading.Lock()
        self._rounds_count = 0
        self.errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run) for _ in range(THREADS_COUNT)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended = True
        for thread in self._threads:
            thread.join()

    def wait_for_more(self) -> None:
        """Wait until each thread has done it several times more, or failed."""
        enough = self._rounds_count + ROUNDS_COUNT * THREADS_COUNT
        wait_until(lambda: self._rounds_count >= enough or bool(self.errors))

    def _run(self) -> None:
        while not self._has_ended and not self.errors:
            try:
                self._work()
            except Exception as error:  # whatever it is, the test tells it
                self.errors.append(error)
            with self._lock:
                self._rounds_count += 1


def certificate_at(target: str, ca: Path) -> bytes:
    """Return the certificate that a new connection is shown."""
    host, _, port = target.rpartition(":")
    context = ssl.create_default_context(cafile=ca)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), 30) as raw,
        context.wrap_socket(raw, server_hostname=host) as stream,
    ):
        shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def test_a_servers_certificate_is_replaced_under_load(
    authority: Authority, next_authority: Authority, both: Path
) -> None:
    files = authority.issue("127.0.0.1")
    successor = next_authority.issue("127.0.0.1")

    with (
        health_server(tls=server_tls(files)) as target,
        deconvd_client.connect(target, tls=Tls(ca=both), transport="grpc") as lasting,
    ):

        def call() -> None:
            with deconvd_client.connect(target, tls=Tls(ca=both), transport="grpc") as F:
                assert F.health() == "SERVING"
            assert lasting.health() == "SERVING"

        with Load(call) as load:
            load.wait_for_more()
            before = certificate_at(target, both)
            successor.take_place_of(files)
            wait_until(lambda: certificate_at(target, both) != before)
            load.wait_for_more()
        after = certificate_at(target, next_authority.ca)

    assert load.errors == []
    assert after != before


def may_call(target: str, ca: Path, client: CertificateFiles) -> bool:
    credentials = grpc.ssl_channel_credentials(
        ca.read_bytes(), client.key.read_bytes(), client.cert.read_bytes()
    )
    with grpc.secure_channel(target, credentials) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            health.Check(health_pb2.HealthCheckRequest(), timeout=30)
        except grpc.RpcError:
            return False
    return True


@pytest.mark.parametrize("first", [Connection.health, call_once, call_in_a_stream])
def test_a_channel_whose_certificate_is_old_when_it_breaks_is_replaced(
    authority: Authority,
    next_authority: Authority,
    both: Path,
    tmp_path: Path,
    first: Callable[[Connection], object],
) -> None:
    server_files = authority.issue("127.0.0.1")
    old, client = authority.issue("old.example"), authority.issue("client.example")
    tls = Tls(authority.ca, client.cert, client.key)
    with ExitStack() as stack:
        server = stack.enter_context(secured_process(tmp_path, **certified(server_files, both)))
        port = free_port()
        with faulty_proxy(server.target, CLEAN, own_port=port) as proxy:
            F = stack.enter_context(
                deconvd_client.connect(
                    proxy.target, tls=tls, transport="grpc", timeout_s=30, fail_fast=True
                )
            )
            F.deconvolution_2d(X, W)
            next_authority.issue("client.example").take_place_of(client)
            staged = tmp_path / "staged"
            staged.write_bytes(next_authority.ca.read_bytes())
            os.replace(staged, both)  # now the server takes no certificate of the old authority
            wait_until(lambda: not may_call(server.target, authority.ca, old))
            F.deconvolution_2d(X, W)  # by the connection that it has
        with faulty_proxy(server.target, CLEAN, own_port=port):  # and the connection has broken
            first(F)
            y = F.deconvolution_2d(X, W)
            assert F.put(X).numpy().shape == X.shape

    assert y.shape == (1, 1, 10, 10)


def test_a_certificate_counts_until_its_end_on_connections_that_last_longer(
    authority: Authority, loopback_certificate: CertificateFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    client, successor = (
        authority.issue("client.example", not_after=now + days * DAY) for days in (1, 3)
    )
    tls = server_tls(loopback_certificate, authority.ca)
    with (
        health_server(tls=tls, authenticator=Authenticator(takes_certificates=True)) as target,
        deconvd_client.connect(
            target, tls=Tls(authority.ca, client.cert, client.key), transport="grpc"
        ) as F,
    ):
        assert F.health() == "SERVING"
        later_s = (now + 2 * DAY).timestamp()
        clock = SimpleNamespace(time=lambda: later_s)
        monkeypatch.setattr("deconvd_server.access.caller_proof.time", clock)
        with pytest.raises(UnauthenticatedError):
            F.health()
        successor.take_place_of(client)
        assert F.health() == "SERVING"


def test_a_token_is_replaced_under_load(tmp_path: Path) -> None:
    table, client_file = tmp_path / "tokens", tmp_path / "token"
    write_tokens(table, {OLD: "team-a", NEW: "team-a"})
    client_file.write_text(OLD)

    with ExitStack() as stack:
        server = stack.enter_context(secured_process(tmp_path, tokens=table))
        F = stack.enter_context(
            deconvd_client.connect(server.target, token=client_file, timeout_s=30)
        )
        kept = F.put(X)

        def call() -> None:
            F.deconvolution_2d(X, W)
            with deconvd_client.connect(server.target, token=client_file, timeout_s=30) as other:
                other.put(X).close()

        with Load(call) as load:
            load.wait_for_more()
            staged = tmp_path / "staged"
            staged.write_text(NEW)
            os.replace(staged, client_file)
            load.wait_for_more()
            wait_until(lambda: token_of(F) == NEW)
            load.wait_for_more()  # the calls that had the old one are over
            write_tokens(table, {NEW: "team-a"})
            wait_until(lambda: is_refused(server.target, OLD))
            load.wait_for_more()
        assert load.errors == []
        np.testing.assert_array_equal(kept.numpy(), X)


def test_a_session_goes_on_with_the_next_token(tmp_path: Path) -> None:
    """The server ends the stream that an old token opened, and the client resumes the session with the new one."""
    table, client_file = tmp_path / "tokens", tmp_path / "token"
    write_tokens(table, {OLD: "team-a", NEW: "team-a"})
    client_file.write_text(OLD)

    with (
        secured_process(tmp_path, tokens=table, lease_s=6) as server,
        deconvd_client.connect(server.target, token=client_file, timeout_s=30) as F,
    ):
        kept = F.put(X)
        session = only_server(F).residents.session_name
        client_file.write_text(NEW)
        wait_until(lambda: token_of(F) == NEW)
        write_tokens(table, {NEW: "team-a"})
        wait_until(lambda: "HoldSession from ipv4:127.0.0.1" in refusals(server.log))

        np.testing.assert_array_equal(kept.numpy(), X)
        assert only_server(F).residents.session_name == session


def refusals(log: Path) -> str:
    """Return the lines of a log about callers that are not known."""
    return "".join(line for line in log.read_text().splitlines() if "UNAUTHENTICATED" in line)


def token_of(F: Connection) -> str:
    token: str = only_server(F).route.target_stub._grpc._rpcs._credentials.token()
    return token


def is_refused(target: str, token: str) -> bool:
    with deconvd_client.connect(target, token=token, timeout_s=30) as F:
        try:
            F.health()
        except UnauthenticatedError:
            return True
    return False


def test_no_secret_is_ever_logged(
    tmp_path: Path,
    authority: Authority,
    loopback_certificate: CertificateFiles,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    table = tmp_path / "tokens"
    write_tokens(table, {OLD: "team-a"})
    errors = []
    with secured_process(
        tmp_path,
        listen=("127.0.0.1:0", "unix"),
        tokens=table,
        **certified(loopback_certificate),
    ) as server:
        tls = Tls(ca=authority.ca)
        for target in server.targets:
            for token in (OLD, NEW):
                with deconvd_client.connect(target, tls=tls, token=token, timeout_s=30) as F:
                    for work in (F.health, F.server_info, lambda: F.put(X)):
                        try:
                            work()
                        except UnauthenticatedError as error:
                            errors.append(repr(error))
        with grpc.secure_channel(
            server.target, grpc.ssl_channel_credentials(authority.ca.read_bytes())
        ) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            for value in (f"Basic {NEW}", NEW, f"Bearer {NEW} {OLD}"):
                with pytest.raises(grpc.RpcError) as raised:
                    health.Check(
                        health_pb2.HealthCheckRequest(), metadata=(("authorization", value),)
                    )
                errors.append(repr(raised.value))
        write_tokens(table, {NEW: "team-a"})
        wait_until(lambda: is_refused_by_unix(server.targets[1], OLD))
        server_log = server.log.read_text()

    key_lines = loopback_certificate.key.read_text().splitlines()[1:-1]
    texts = [server_log, caplog.text, "".join(capfd.readouterr()), *errors]
    assert "UNAUTHENTICATED" in server_log
    assert len(errors) >= 9
    for secret in (OLD, NEW, *key_lines):
        assert not any(secret in text for text in texts)


def is_refused_by_unix(target: str, token: str) -> bool:
    with suppress(UnauthenticatedError), deconvd_client.connect(target, token=token) as F:
        F.health()
        return False
    return True
