"""Who may call by gRPC: tokens and certificates, on every kind of RPC, of our client and of others."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import deconvd_client
from deconvd.errors import UnauthenticatedError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd_client import Connection, Tls, UnavailableError
from deconvd_client.calls.transport import TlsFailureError
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.tokens import TokenFile
from deconvd_server.call.context import CallContext
from deconvd_server.daemon import Daemon
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.settings import Settings
from deconvd_server.transports.grpc.callers import CallerReader, _certificate_name
from deconvd_server.transports.grpc.health import Health
from tests.certificates import Authority, CertificateFiles
from tests.processes import wait_until
from tests.secured_servers import (
    certified,
    health_server,
    secured_process,
    server_tls,
)
from tests.servers import ServerProcess, free_port, server_process
from tests.token_calls import write_tokens

TOKEN = "dcd_" + "a-good_token" * 3
WRONG = "dcd_" + "a-wrong-token" * 3
DAY = datetime.timedelta(days=1)
X = np.ones((1, 4, 8, 8), np.float32)
LARGE_X = np.ones((16, 4, 200, 200), np.float32)  # over 4 MiB: sent in a stream
W = np.ones((4, 1, 3, 3), np.float32)
HEALTH_REQUEST = health_pb2.HealthCheckRequest()

CALLS: dict[str, Callable[[Connection], object]] = {
    "message": lambda F: F.deconvolution_2d(X, W),
    "stream": lambda F: F.deconvolution_2d(LARGE_X, W),
    "session": lambda F: F.put(X),
    "server_info": lambda F: F.server_info(),
    "health": lambda F: F.health(),
}
each_call = pytest.mark.parametrize("name", CALLS)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    write_tokens(path, {TOKEN: "team-a"})
    return path


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, loopback_certificate: CertificateFiles, tokens: Path
) -> Iterator[ServerProcess]:
    """A server with TLS and tokens, at a TCP address and a Unix socket."""
    with secured_process(
        tmp_path_factory.mktemp("server"),
        listen=("127.0.0.1:0", "unix"),
        tokens=tokens,
        **certified(loopback_certificate),
    ) as running:
        yield running


def connected(server: ServerProcess, authority: Authority, **options: Any) -> Connection:
    options = {"tls": Tls(ca=authority.ca), "transport": "grpc", "timeout_s": 30.0, **options}
    return deconvd_client.connect(server.target, **options)


class TestTokens:
    @each_call
    def test_who_has_the_token_is_served(
        self, guarded: ServerProcess, authority: Authority, name: str
    ) -> None:
        with connected(guarded, authority, token=TOKEN) as F:
            assert CALLS[name](F) is not None

    @each_call
    @pytest.mark.parametrize(
        ("token", "why"), [(None, "must know who calls"), (WRONG, "token must be one")]
    )
    def test_who_has_not_is_refused_in_every_kind_of_call(
        self, guarded: ServerProcess, authority: Authority, name: str, token: str | None, why: str
    ) -> None:
        with (
            connected(guarded, authority, token=token) as F,
            pytest.raises(deconvd_client.UnauthenticatedError, match=why) as raised,
        ):
            CALLS[name](F)

        assert isinstance(raised.value, PermissionError)
        assert "\n" not in str(raised.value)
        assert WRONG not in repr(raised.value)

    def test_a_unix_socket_takes_who_has_none_but_no_wrong_one(
        self, guarded: ServerProcess
    ) -> None:
        with deconvd_client.connect(guarded.targets[1]) as F:
            assert F.health() == "SERVING"
            assert F.put(X) is not None
        with deconvd_client.connect(guarded.targets[1], token=TOKEN) as F:
            assert F.health() == "SERVING"
        with (
            deconvd_client.connect(guarded.targets[1], token=WRONG) as F,
            pytest.raises(UnauthenticatedError),
        ):
            F.health()

    def test_asyncio_and_the_command_have_them_too(
        self, guarded: ServerProcess, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from click.testing import CliRunner

        from deconvd_client.cli import main

        monkeypatch.setenv("DECONVD_TLS_CA", str(authority.ca))
        refused = CliRunner().invoke(main, ["status", "--target", guarded.target])
        monkeypatch.setenv("DECONVD_TOKEN", TOKEN)
        served = CliRunner().invoke(main, ["status", "--target", guarded.target])

        assert refused.exit_code == 1
        assert "set DECONVD_TOKEN" in refused.output
        assert served.exit_code == 0, served.output

    def test_a_server_that_takes_no_token_does_not_mind_one(self, server: ServerProcess) -> None:
        with deconvd_client.connect(server.target, token=TOKEN) as F:
            np.testing.assert_array_equal(F.put(X).numpy(), X)

    def test_a_revoked_token_ends_the_session_that_it_opened(
        self, tmp_path: Path, loopback_certificate: CertificateFiles, authority: Authority
    ) -> None:
        tokens = tmp_path / "tokens"
        write_tokens(tokens, {TOKEN: "team-a", WRONG: "team-b"})
        with (
            secured_process(tmp_path, tokens=tokens, **certified(loopback_certificate)) as running,
            stock_channel(running.target, authority) as channel,
        ):
            go_on = threading.Semaphore(0)

            def heartbeats() -> Iterator[pb.HoldSessionRequest]:
                yield pb.HoldSessionRequest()
                while go_on.acquire(timeout=30):
                    yield pb.HoldSessionRequest()

            stub = pb_grpc.DeconvolutionServiceStub(channel)
            held = stub.HoldSession(heartbeats(), metadata=bearer(TOKEN))
            assert next(held).session
            write_tokens(tokens, {WRONG: "team-b"})
            wait_until(lambda: is_refused(channel, bearer(TOKEN)))
            go_on.release()
            with pytest.raises(grpc.RpcError) as raised:
                next(held)

        assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


@contextmanager
def stock_channel(target: str, authority: Authority, *clients: CertificateFiles) -> Iterator[Any]:
    """Open a channel as grpcio's documentation says, for the block."""
    pair = (clients[0].key.read_bytes(), clients[0].cert.read_bytes()) if clients else ()
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes(), *pair)
    with grpc.secure_channel(target, credentials) as channel:
        yield channel


def is_refused(channel: grpc.Channel, metadata: Any) -> bool:
    try:
        check(channel, metadata)
    except grpc.RpcError as error:
        return cast("grpc.Call", error).code() is grpc.StatusCode.UNAUTHENTICATED
    return False


def check(channel: grpc.Channel, metadata: Any) -> object:
    health: Any = health_pb2_grpc.HealthStub(channel)
    return health.Check(HEALTH_REQUEST, metadata=metadata, timeout=30)


def watch(channel: grpc.Channel, metadata: Any) -> object:
    health: Any = health_pb2_grpc.HealthStub(channel)
    return next(health.Watch(HEALTH_REQUEST, metadata=metadata, timeout=30))


def reflect(channel: grpc.Channel, metadata: Any) -> object:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    return next(stub.ServerReflectionInfo(iter([request]), metadata=metadata, timeout=30))


STOCK_CALLS: dict[str, Callable[[grpc.Channel, Any], object]] = {
    "check": check,
    "watch": watch,
    "reflection": reflect,
    "info": lambda channel, metadata: pb_grpc.DeconvolutionServiceStub(channel).GetServerInfo(
        pb.GetServerInfoRequest(), metadata=metadata, timeout=30
    ),
    "session": lambda channel, metadata: next(
        pb_grpc.DeconvolutionServiceStub(channel).HoldSession(
            iter([pb.HoldSessionRequest()]), metadata=metadata, timeout=30
        )
    ),
}


class TestStockClients:
    @pytest.mark.parametrize("name", STOCK_CALLS)
    def test_the_header_is_all_that_they_need(
        self, guarded: ServerProcess, authority: Authority, name: str
    ) -> None:
        with stock_channel(guarded.target, authority) as channel:
            assert STOCK_CALLS[name](channel, bearer(TOKEN)) is not None
            for metadata in (None, bearer(WRONG)):
                with pytest.raises(grpc.RpcError) as raised:
                    STOCK_CALLS[name](channel, metadata)
                assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED

    def test_a_method_that_does_not_exist_is_no_way_to_ask_without_it(
        self, guarded: ServerProcess, authority: Authority
    ) -> None:
        with stock_channel(guarded.target, authority) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/no/Such")
            codes = []
            for metadata in (None, bearer(TOKEN)):
                with pytest.raises(grpc.RpcError) as raised:
                    call(b"", metadata=metadata, timeout=30)
                codes.append(raised.value.code())

        assert codes == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED]

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
    def test_the_schemes_case_does_not_matter(
        self, guarded: ServerProcess, authority: Authority, scheme: str
    ) -> None:
        with stock_channel(guarded.target, authority) as channel:
            assert not is_refused(channel, (("authorization", f"{scheme} {TOKEN}"),))

    @pytest.mark.parametrize(
        "values",
        [
            *([TOKEN], [f"Basic {TOKEN}"], [f"Bearer  {TOKEN}"], [f"Bearer {TOKEN} {TOKEN}"]),
            *(["Bearer"], ["Bearer "], [""], [f"Bearer {'x' * 513}"]),
            [f"Bearer {TOKEN}", f"Bearer {TOKEN}"],
        ],
    )
    def test_a_header_in_another_form_is_refused(
        self, guarded: ServerProcess, authority: Authority, values: list[str]
    ) -> None:
        metadata = tuple(("authorization", value) for value in values)
        with stock_channel(guarded.target, authority) as channel:
            assert is_refused(channel, metadata)


class Identities:
    """An observer that remembers who made the calls."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def begin(self, method: str, call: CallContext) -> None:
        self.seen.append((call.identity, call.peer_key))

    def end(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def observed(
    loopback_certificate: CertificateFiles,
    authority: Authority,
    tokens: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Daemon, Identities]]:
    identities = Identities()
    settings = Settings(
        ["127.0.0.1:0", f"unix:{tmp_path_factory.mktemp('sockets')}/s"],
        2 << 20,
        drain_timeout_s=10,
        takes_direct_calls=False,
        authenticator=Authenticator(TokenFile(tokens), takes_certificates=True),
        tls=server_tls(loopback_certificate, authority.ca),
    )
    daemon = Daemon(settings, [identities])
    daemon.serve(lambda: [CpuDevice(1)])
    yield daemon, identities
    daemon.drain()


class TestIdentity:
    def caller_of(
        self, observed: tuple[Daemon, Identities], index: int = 0, **options: Any
    ) -> tuple[str, str]:
        daemon, identities = observed
        with deconvd_client.connect(
            daemon.addresses[index], transport="grpc", timeout_s=30, **options
        ) as F:
            F.server_info()
        return identities.seen[-1]

    def test_a_certificate_names_its_client(
        self, observed: tuple[Daemon, Identities], authority: Authority
    ) -> None:
        named = authority.issue("host.example", common_name="team-c")
        unnamed = authority.issue("first.example", "second.example")

        callers = [
            self.caller_of(observed, tls=Tls(authority.ca, files.cert, files.key))
            for files in (named, unnamed)
        ]

        assert callers == [
            ("team-c", "tenant team-c"),
            ("first.example", "tenant first.example"),
        ]

    def test_a_token_counts_before_a_certificate(
        self, observed: tuple[Daemon, Identities], authority: Authority
    ) -> None:
        files = authority.issue("proxy.example", common_name="proxy")
        tls = Tls(authority.ca, files.cert, files.key)

        assert self.caller_of(observed, tls=tls, token=TOKEN) == ("team-a", "tenant team-a")
        with pytest.raises(UnauthenticatedError):
            self.caller_of(observed, tls=tls, token=WRONG)

    def test_by_a_unix_socket_the_peer_counts_unless_there_is_a_token(
        self, observed: tuple[Daemon, Identities]
    ) -> None:
        assert self.caller_of(observed, 1) == ("", "gRPC over Unix sockets")
        assert self.caller_of(observed, 1, token=TOKEN) == ("team-a", "tenant team-a")

    @pytest.mark.parametrize(
        ("properties", "name"),
        [
            ({b"x509_common_name": [b"a"], b"peer_dns": [b"b"], b"x509_subject": [b"CN=a"]}, "a"),
            ({b"x509_common_name": ["\N{SNOWMAN}".encode()]}, "\N{SNOWMAN}"),
            ({b"x509_common_name": [b"admin"], b"x509_subject": [rb"CN=admin\00.evil"]}, ""),
            ({b"x509_common_name": [b"\xff"]}, ""),
            ({b"x509_common_name": [b"a\nb"]}, ""),
            ({b"peer_dns": [b"b"], b"x509_pem_cert": [b"no certificate"]}, ""),
            ({b"transport_security_type": [b"ssl"]}, ""),
        ],
    )
    def test_a_name_that_is_none_counts_as_none(
        self, properties: dict[bytes, list[bytes]], name: str
    ) -> None:
        assert _certificate_name(properties) == name

    @pytest.mark.parametrize(
        ("common_name", "dns_name"),
        [("team-a\0.evil.example", b"evil.example"), ("", b"team-a\0.evil.example")],
    )
    def test_a_null_in_a_name_does_not_make_another_client_of_it(
        self,
        observed: tuple[Daemon, Identities],
        authority: Authority,
        common_name: str,
        dns_name: bytes,
    ) -> None:
        files = authority.issue_unchecked(common_name, dns_name)

        with pytest.raises((UnauthenticatedError, TlsFailureError)):
            self.caller_of(observed, tls=Tls(authority.ca, files.cert, files.key))


def test_refused_calls_reach_no_handler(
    authority: Authority, loopback_certificate: CertificateFiles, tokens: Path
) -> None:
    reached: list[str] = []

    class Recording(Health):
        def __init__(self) -> None:
            super().__init__()
            self.handlers = {
                path: lambda rpc, path=path: reached.append(path) or rpc.finish(())  # type: ignore[func-returns-value,misc]  # it runs both
                for path in self.handlers
            }

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.secured_servers.Health", Recording)
        with (
            health_server(
                tls=server_tls(loopback_certificate), authenticator=Authenticator(TokenFile(tokens))
            ) as address,
            stock_channel(address, authority) as channel,
        ):
            endless: Any = channel.stream_unary("/grpc.health.v1.Health/Watch")
            never = threading.Event()
            with pytest.raises(grpc.RpcError) as raised:  # though no message has come
                endless(iter(never.wait, None), timeout=30)
            never.set()

    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert reached == []


class Faulty(NamedTuple):
    """A certificate that must not be accepted, and what the other side says of it."""

    files: CertificateFiles
    ca: Path
    why: str


FAULTS = ["another authority", "expired", "not yet"]


@pytest.fixture(params=FAULTS)
def faulty(
    request: pytest.FixtureRequest, authority: Authority, other_authority: Authority
) -> Faulty:
    names = ("127.0.0.1", "client.example")
    match request.param:
        case "another authority":
            return Faulty(other_authority.issue(*names), authority.ca, "unable to get local issuer")
        case "expired":
            files = authority.issue(*names, not_before=now() - 2 * DAY, not_after=now() - DAY)
            return Faulty(files, authority.ca, "certificate has expired")
        case "not yet":
            files = authority.issue(*names, not_before=now() + DAY, not_after=now() + 2 * DAY)
            return Faulty(files, authority.ca, "certificate is not yet valid")
        case _:
            return Faulty(authority.issue("other.example"), authority.ca, "not for the name 127")


@contextmanager
def openssl_server(
    files: CertificateFiles, client_ca: Path, version: ssl.TLSVersion
) -> Iterator[str]:
    """Listen for the block as other programs do, which tell clients by an alert what is wrong."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca)
    context.load_cert_chain(files.cert, files.key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def listen() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.settimeout(30)
                    context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=listen)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, of calls that are tried again."""
    pauses: list[float] = []
    monkeypatch.setattr(
        "deconvd_client.transports.retry_policy.RetryPolicy._sleep",
        lambda _self, pause_s, _deadline: pauses.append(pause_s),
    )
    # however slow this machine is
    monkeypatch.setattr("deconvd_client.transports.grpc.tls_failures._PROBE_TIMEOUT_S", 30.0)
    return pauses


class TestTlsFailures:
    """Each is one line that says what to change, and no call is tried again."""

    def call(self, target: str, **options: Any) -> str:
        with (
            deconvd_client.connect(target, timeout_s=30, **options) as F,
            pytest.raises(UnavailableError) as raised,
        ):
            F.deconvolution_2d(X, W)
        assert isinstance(raised.value, TlsFailureError), raised.value
        assert "\n" not in str(raised.value)
        assert target in str(raised.value)
        return str(raised.value)

    @pytest.mark.parametrize("faulty", [*FAULTS, "other name"], indirect=True)
    def test_a_servers_certificate_that_is_not_good(
        self, faulty: Faulty, attempts: list[float]
    ) -> None:
        with health_server(tls=server_tls(faulty.files)) as address:
            assert faulty.why in self.call(address, tls=Tls(ca=faulty.ca))
        assert attempts == []

    def test_a_clients_certificate_that_is_not_good(
        self,
        faulty: Faulty,
        authority: Authority,
        loopback_certificate: CertificateFiles,
        attempts: list[float],
    ) -> None:
        tls = Tls(authority.ca, faulty.files.cert, faulty.files.key)
        with health_server(tls=server_tls(loopback_certificate, authority.ca)) as address:
            assert "does not accept the certificate" in self.call(address, tls=tls)
        assert attempts == []

    def test_no_certificate_where_one_is_asked_for(
        self,
        authority: Authority,
        loopback_certificate: CertificateFiles,
        attempts: list[float],
    ) -> None:
        with health_server(tls=server_tls(loopback_certificate, authority.ca)) as address:
            text = self.call(address, tls=Tls(ca=authority.ca))
        assert "set DECONVD_CLIENT_CERT and DECONVD_CLIENT_KEY" in text
        assert attempts == []

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    @pytest.mark.parametrize("has_tls", [True, False])
    def test_no_certificate_where_what_ends_tls_is_not_grpc(
        self,
        authority: Authority,
        loopback_certificate: CertificateFiles,
        version: ssl.TLSVersion,
        has_tls: bool,
        attempts: list[float],
    ) -> None:
        with openssl_server(loopback_certificate, authority.ca, version) as address:
            text = self.call(address, tls=Tls(ca=authority.ca) if has_tls else None)
        assert ("asks for a client's certificate" if has_tls else "speaks TLS") in text
        assert attempts == []

    def test_a_client_without_tls_at_a_server_with_it(
        self, loopback_certificate: CertificateFiles, attempts: list[float]
    ) -> None:
        with health_server(tls=server_tls(loopback_certificate)) as address:
            assert "speaks TLS, and this client does not" in self.call(address)
        assert attempts == []

    def test_a_client_with_tls_at_a_server_without_it(
        self, server: ServerProcess, authority: Authority, attempts: list[float], tmp_path: Path
    ) -> None:
        with server_process(tmp_path, listen=("127.0.0.1:0",)) as plain:
            text = self.call(plain.target, tls=Tls(ca=authority.ca), token=TOKEN)
        assert "start the server with --tls-cert" in text
        assert attempts == []

    def test_the_name_of_the_server_can_be_given(self, authority: Authority) -> None:
        files = authority.issue("inner.example")
        tls = Tls(ca=authority.ca, server_name="inner.example")
        with (
            health_server(tls=server_tls(files)) as address,
            deconvd_client.connect(address, tls=tls) as F,
        ):
            assert F.health() == "SERVING"

    def test_the_authorities_of_the_system(
        self,
        authority: Authority,
        loopback_certificate: CertificateFiles,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        with health_server(tls=server_tls(loopback_certificate)) as address:
            assert "unable to get local issuer" in self.call(address, tls=True)
            monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
            with deconvd_client.connect(address, tls=True) as F:
                assert F.health() == "SERVING"

    def test_nobody_at_the_port_is_nothing_of_tls(self, authority: Authority) -> None:
        target = f"127.0.0.1:{free_port()}"
        with (
            deconvd_client.connect(target, tls=Tls(ca=authority.ca), fail_fast=True) as F,
            pytest.raises(UnavailableError, match="is deconvd-server running at") as raised,
        ):
            F.health()
        assert not isinstance(raised.value, TlsFailureError)


@pytest.mark.parametrize("answers_plainly", [True, False])
def test_a_client_with_tls_never_sends_its_token_in_plain_text(
    authority: Authority, answers_plainly: bool
) -> None:
    """The listener is an attacker on the way, who hopes that the client falls back."""
    heard = bytearray()
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def listen() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    heard.extend(connection.recv(1 << 16))
                    if answers_plainly:
                        connection.sendall(b"\0\0\0\4\0\0\0\0\0")

        thread = threading.Thread(target=listen)
        thread.start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        with (
            deconvd_client.connect(
                target, tls=Tls(ca=authority.ca), token=TOKEN, timeout_s=2, fail_fast=True
            ) as F,
            pytest.raises(deconvd_client.DeconvdError),
        ):
            F.deconvolution_2d(X, W)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()

    assert heard.startswith(b"\x16\x03")
    assert b"PRI * HTTP/2.0" not in heard
    assert TOKEN.encode() not in heard


def test_the_connection_is_encrypted_with_a_version_of_today(
    loopback_certificate: CertificateFiles, authority: Authority
) -> None:
    with health_server(tls=server_tls(loopback_certificate)) as address:
        host, _, port = address.rpartition(":")
        context = ssl.create_default_context(cafile=authority.ca)
        with (
            socket.create_connection((host, int(port)), 30) as raw,
            context.wrap_socket(raw, server_hostname=host) as stream,
        ):
            version = stream.version()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname = False
        old.verify_mode = ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1 is deprecated"):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with (
            socket.create_connection((host, int(port)), 30) as raw,
            pytest.raises(ssl.SSLError),
        ):
            old.wrap_socket(raw)

    assert version == "TLSv1.3"


def is_serving(F: Connection) -> bool:
    with suppress(UnavailableError):  # a slow machine may take long for a handshake, too
        return F.health() == "SERVING"
    return False


@pytest.mark.parametrize("is_secure", [False, True])
def test_who_connects_and_says_nothing_is_cut_off_and_hinders_nobody(
    authority: Authority,
    loopback_certificate: CertificateFiles,
    monkeypatch: pytest.MonkeyPatch,
    is_secure: bool,
) -> None:
    monkeypatch.setattr("deconvd_server.transports.grpc.server._HANDSHAKE_S", 1.0)
    tls = server_tls(loopback_certificate) if is_secure else None
    with health_server(tls=tls) as address, ExitStack() as stack:
        host, _, port = address.rpartition(":")
        silent = [
            stack.enter_context(socket.create_connection((host, int(port)), 30)) for _ in range(50)
        ]
        with deconvd_client.connect(
            address, tls=Tls(ca=authority.ca) if is_secure else None, timeout_s=30
        ) as F:
            wait_until(lambda: is_serving(F))
        for connection in silent:
            while connection.recv(1 << 10):  # without TLS, a server of HTTP/2 speaks first
                pass


def test_failed_handshakes_write_nothing_to_the_log(guarded: ServerProcess) -> None:
    host, _, port = guarded.target.rpartition(":")
    for _ in range(10):
        with socket.create_connection((host, int(port)), 30) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with suppress(ConnectionError):
                while connection.recv(1 << 10):
                    pass

    text = guarded.log.read_text()
    assert "Handshake failed" not in text
    assert "SSL" not in text


def test_a_reader_of_an_open_server_reads_nothing() -> None:
    assert CallerReader().is_open
