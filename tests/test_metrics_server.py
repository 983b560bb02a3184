"""The port for metrics: who may read what there, and strangers that cannot keep others from it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import click
import numpy as np
import pytest

import deconvd_client
from deconvd.errors import InvalidArgumentError, UnauthenticatedError
from deconvd_client import Tls
from deconvd_client.transports.route import TransportName
from deconvd_server.__main__ import main
from deconvd_server.access_options import AccessPolicy, load_access_policy
from deconvd_server.daemon import Daemon
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.exit_codes import ExitCode
from deconvd_server.resources.socket_file import AddressInUseError
from deconvd_server.settings import Settings
from tests.certificates import Authority, CertificateFiles
from tests.devices import HoldingDevice
from tests.processes import process_resources, wait_until
from tests.scrapes import Scrape, metrics_address, raw_answer, scrape, trusting
from tests.servers import ServerProcess, server_process
from tests.token_calls import write_tokens

X = np.ones((1, 2, 8, 8), np.float32)
W = np.ones((2, 3, 2, 2), np.float32)
CALLS = "deconvd_calls_total"
NAMES = {"token-of-prometheus": "prometheus", "token-of-a": "team-a", "token-of-b": "team-b"}
CONNECTIONS_COUNT = 16
QUICK_S = 0.02
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"

SHORT_TIMES = {
    "deconvd_server.metrics.server:_REQUEST_S": 1.0,
    "deconvd_server.metrics.server:_RESPONSE_S": 1.0,
}


class Guarded:
    """A server with TLS and tokens, and a scraper that trusts it."""

    def __init__(self, server: ServerProcess, tokens: Path, ca: Path) -> None:
        self.target = server.target
        self.address = metrics_address(server)
        self.tokens = tokens
        self.ca = ca
        self.log = server.log

    def scrape(self, token: str) -> Scrape:
        return scrape(self.address, token=token, tls=trusting(self.ca))


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory,
    authority: Authority,
    loopback_certificate: CertificateFiles,
) -> Iterator[Guarded]:
    directory = tmp_path_factory.mktemp("guarded")
    tokens = write_tokens(directory / "tokens", NAMES)
    options = (
        *("--tls-cert", loopback_certificate.cert, "--tls-key", loopback_certificate.key),
        *("--tokens", tokens, "--metrics-port", 0, "--metrics-readers", "prometheus,grafana"),
    )
    with server_process(
        directory,
        *map(str, options),
        listen=("127.0.0.1:0",),
        constants={"deconvd.host.watched_files:_CHECK_PERIOD_S": QUICK_S},
    ) as server:
        yield Guarded(server, tokens, authority.ca)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    options = "--metrics-port", "0", "--log-level", "debug"
    with server_process(directory, *options, constants=SHORT_TIMES) as running:
        yield running


@pytest.fixture(scope="module")
def address(server: ServerProcess) -> str:
    """Where a server that asks for nothing serves metrics. By Unix sockets alone that is on loopback."""
    where = metrics_address(server)
    assert where.startswith("127.0.0.1:")
    return where


# Who may read what


def test_readers_see_the_calls_of_all_tenants_and_others_their_own(guarded: Guarded) -> None:
    for token in ("token-of-a", "token-of-b"):
        with deconvd_client.connect(guarded.target, token=token, tls=Tls(ca=guarded.ca)) as F:
            F.deconvolution_2d(X, W)
            with F.put(X):
                pass
    wait_until(lambda: not guarded.scrape("token-of-prometheus").value("deconvd_calls_running"))

    whole, own = map(guarded.scrape, ("token-of-prometheus", "token-of-a"))

    assert whole.label_values(CALLS, "tenant") == {"team-a", "team-b"}
    assert own.label_values(CALLS, "tenant") == {"team-a"}
    for tenant in ("team-a", "team-b"):
        assert whole.value(CALLS, tenant=tenant, method="Deconvolve", status="OK") == 1
    stage = "deconvd_call_stage_seconds_count"
    assert (whole.value(stage, stage="server"), own.value(stage, stage="server")) == (2, 1)
    assert whole.label_values("deconvd_device_memory_bytes", "use") == {"calls", "reserved"}
    assert own.label_values("deconvd_device_memory_bytes", "use") == {"calls"}
    assert whole.label_values("deconvd_cache_entries", "cache") == {"resident tensors"}
    assert own.label_values("deconvd_cache_entries", "cache") == set()


@pytest.mark.parametrize("transport", ["grpc", "tcp"])
def test_calls_of_strangers_are_counted_without_their_methods(
    guarded: Guarded, transport: TransportName
) -> None:
    name = "deconvd_unauthenticated_calls_total"
    before = guarded.scrape("token-of-prometheus")

    with deconvd_client.connect(
        guarded.target, token="a-stranger", tls=Tls(ca=guarded.ca), transport=transport
    ) as F:
        with pytest.raises(UnauthenticatedError):
            F.deconvolution_2d(X, W)

    after = guarded.scrape("token-of-prometheus")
    assert after.value(name) > before.value(name)
    assert after.value(CALLS) == before.value(CALLS)
    assert guarded.scrape("token-of-a").value(name) == 0


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer a-stranger", "Basic dXNlcjpwYXNz", "Bearer " + "x" * 600, "Bearer é"],
)
def test_who_has_no_valid_token_is_told_to_show_one(guarded: Guarded, header: str) -> None:
    headers = {"Authorization": header} if header else {}

    refused = scrape(guarded.address, headers=headers, tls=trusting(guarded.ca))

    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert refused.body == b"a valid token is needed\n"


def test_a_refused_scrape_is_logged_without_its_token(guarded: Guarded) -> None:
    assert guarded.scrape("token-of-a-stranger").status == 401

    line = "/metrics from tcp: 127.0.0.1:"
    wait_until(lambda: line in guarded.log.read_text())
    assert "token-of-a-stranger" not in guarded.log.read_text()


def test_two_tokens_are_none(guarded: Guarded) -> None:
    host, _, port = guarded.address.rpartition(":")
    lines = b"".join(b"Authorization: Bearer %s\r\n" % token.encode() for token in sorted(NAMES))
    with (
        socket.create_connection((host, int(port)), 30) as plain,
        trusting(guarded.ca).wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall(b"GET /metrics HTTP/1.1\r\n" + lines + b"\r\n")
        answer = connection.recv(1 << 16)

    assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n")


def test_a_revoked_token_counts_no_longer(guarded: Guarded) -> None:
    assert guarded.scrape("token-of-prometheus").status == 200

    write_tokens(guarded.tokens, {"token-of-a": "team-a"})
    try:
        wait_until(lambda: guarded.scrape("token-of-prometheus").status == 401)
        assert guarded.scrape("token-of-a").status == 200
    finally:
        write_tokens(guarded.tokens, NAMES)
    wait_until(lambda: guarded.scrape("token-of-prometheus").status == 200)


def test_plain_text_gets_nothing_where_tls_is_spoken(guarded: Guarded) -> None:
    assert b"HTTP" not in raw_answer(guarded.address, REQUEST)
    assert guarded.scrape("token-of-prometheus").status == 200


def test_a_certificate_names_its_reader_and_a_new_server_certificate_counts(
    tmp_path: Path, authority: Authority
) -> None:
    served, renewed = authority.issue("127.0.0.1"), authority.issue("127.0.0.1")
    (tmp_path / "clients").mkdir()
    clients = Authority(tmp_path / "clients")
    shown = [clients.issue("x", common_name=name) for name in ("prometheus", "team-a")]
    options = (
        *("--tls-cert", served.cert, "--tls-key", served.key, "--tls-client-ca", clients.ca),
        *("--metrics-port", 0, "--metrics-readers", "prometheus"),
    )
    with server_process(
        tmp_path,
        *map(str, options),
        listen=("127.0.0.1:0",),
        constants={"deconvd.host.watched_files:_CHECK_PERIOD_S": QUICK_S},
    ) as server:
        address = metrics_address(server)
        reader, team = (trusting(authority.ca, (each.cert, each.key)) for each in shown)
        uses = [
            scrape(address, tls=context).label_values("deconvd_device_memory_bytes", "use")
            for context in (reader, team)
        ]
        with pytest.raises(OSError, match=r"(?i)certificate required|reset|closed|eof|broken"):
            scrape(address, tls=trusting(authority.ca))
        renewed.take_place_of(served)
        wait_until(lambda: _served_certificate(address, reader) == _der(renewed))
        assert scrape(address, tls=reader).status == 200

    assert uses == [{"calls", "reserved"}, {"calls"}]


def _served_certificate(address: str, context: ssl.SSLContext) -> bytes | None:
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), 30) as plain,
        context.wrap_socket(plain, server_hostname=host) as connection,
    ):
        return connection.getpeercert(binary_form=True)


def _der(files: CertificateFiles) -> bytes:
    pem = files.cert.read_text()
    end = "-----END CERTIFICATE-----\n"
    return ssl.PEM_cert_to_DER_cert(pem[: pem.index(end) + len(end)])


def test_other_hosts_read_nothing_of_a_server_that_knows_no_callers() -> None:
    options = "--device", "cpu", "--listen", "0.0.0.0:0", "--metrics-port", "0"
    command = [sys.executable, "-W", "error", "-m", "deconvd_server", *options]

    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == ExitCode.WRONG_OPTION
    assert "other hosts can reach 0.0.0.0:0" in ended.stderr
    assert "openssl req -x509" in ended.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("--metrics-port", "70000"),
        ("--metrics-port", "-1"),
        ("--metrics-readers", "a,,b"),
        ("--metrics-readers", " a"),
        ("--metrics-readers", "a\nb"),
    ],
)
def test_wrong_options_are_named(options: tuple[str, ...]) -> None:
    with pytest.raises(click.BadParameter) as raised:
        main.make_context("deconvd-server", [*options])

    assert raised.value.param is not None
    assert options[0] in raised.value.param.opts


def policy(tokens: Path | None) -> AccessPolicy:
    return load_access_policy(
        ["127.0.0.1:0"],
        tls_cert=None,
        tls_key=None,
        tls_client_ca=None,
        tokens=tokens,
        is_insecure=False,
    )


def test_readers_are_named_where_that_makes_a_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened, asking = policy(None), policy(write_tokens(tmp_path / "tokens", NAMES))

    with pytest.raises(InvalidArgumentError, match="--metrics-readers needs --metrics-port, too"):
        asking.check_readers(None, ["a"])
    with pytest.raises(InvalidArgumentError, match="needs --tokens or --tls-client-ca, too"):
        opened.check_readers(0, ["a"])
    opened.check_readers(0, [])
    asking.check_readers(None, [])
    asking.check_readers(0, ["prometheus"])
    assert not caplog.messages
    asking.check_readers(0, [])
    assert "--metrics-readers names who does" in caplog.text


def test_the_line_on_standard_output_says_who_reads(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", NAMES)
    options = "--tokens", str(tokens), "--metrics-port", "0", "--metrics-readers", "prometheus"
    with server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as server:
        assert server.process.stdout is not None
        line = server.process.stdout.readline()

    assert line.startswith("deconvd-server: metrics on 127.0.0.1:")
    who = f"readers: tokens of {tokens}; of all calls: prometheus, of their own: the others"
    assert line.endswith(f" (not encrypted; {who})\n")
    nobody = policy(tokens).describe_readers("127.0.0.1:1", [])
    assert nobody == f"not encrypted; {who.replace('prometheus', 'nobody')}"
    assert policy(None).describe_readers("127.0.0.1:1", []) == (
        "not encrypted; readers: everyone on this host"
    )


# HTTP


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/metrics", 200),
        ("HEAD", "/metrics", 200),
        ("GET", "/metrics?name[]=deconvd_ready", 200),
        ("GET", "http://elsewhere/metrics", 200),
        ("GET", "/", 404),
        ("GET", "/metrics/", 404),
        ("GET", "//metrics", 404),
        ("GET", "/favicon.ico", 404),
        ("POST", "/metrics", 405),
        ("OPTIONS", "/metrics", 405),
        ("CONNECT", "/metrics", 405),
    ],
)
def test_metrics_can_be_read_and_nothing_else(
    address: str, method: str, path: str, status: int
) -> None:
    answer = raw_answer(address, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert (b"Allow: GET, HEAD" in head) == (status == 405)
    size = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0])
    assert size > 0
    assert len(body) == (0 if method == "HEAD" else size)


def test_a_body_that_nobody_asked_for_does_not_cost_the_answer(address: str) -> None:
    head = b"POST /metrics HTTP/1.1\r\nContent-Length: 1048576\r\n\r\n"

    assert raw_answer(address, head, bytes(1 << 20)).startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /metrics HTTP/2.0\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 400),
        (b"\0" * 100 + b"\n\n", 400),
        (b"GET /metrics HTTP/1.1\r\nAccept: \xff\xfe\r\nAccept-Encoding: \0\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.0\n\n", 200),
        (b"GET /metrics HTTP/1.1\r\nAccept: text/plain;version=1s\r\n\r\n", 200),
        (b"GET /metrics HTTP/1.1\r\nA: " + b"x" * (17 << 10) + b"\r\n\r\n", 431),
        (b"x" * (1 << 20), 431),
    ],
)
def test_strangers_bytes_get_an_answer_that_says_what_is_wrong(
    server: ServerProcess, address: str, sent: bytes, status: int
) -> None:
    answer = raw_answer(address, sent)

    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert "Traceback" not in server.log.read_text()


def test_what_never_becomes_a_request_is_cut(server: ServerProcess, address: str) -> None:
    begun = [b"", b"G", REQUEST[:-1], b"\x16\x03\x01\x02\x00\x01\x00", bytes(range(256))]

    with ThreadPoolExecutor(len(begun)) as strangers:
        answers = [*strangers.map(lambda sent: raw_answer(address, sent), begun)]
    answers += [raw_answer(address, sent, is_ended=True) for sent in begun]

    assert answers == [b""] * 2 * len(begun)
    assert "Traceback" not in server.log.read_text()


def test_a_request_that_comes_byte_by_byte_is_one(address: str) -> None:
    parts = [REQUEST[at : at + 1] for at in range(len(REQUEST))]

    assert raw_answer(address, *parts).startswith(b"HTTP/1.1 200 OK\r\n")


# Strangers that want all of it


def test_connections_that_say_nothing_keep_nobody_out(server: ServerProcess, address: str) -> None:
    host, _, port = address.rpartition(":")
    before = process_resources(server.process.pid)
    with ExitStack() as stack:
        for _ in range(5 * CONNECTIONS_COUNT):
            stack.enter_context(socket.create_connection((host, int(port)), 30))
        statuses = {scrape(address).status for _ in range(5)}
        during = process_resources(server.process.pid)

    assert statuses == {200}
    assert during.threads_count - before.threads_count <= CONNECTIONS_COUNT
    assert during.descriptors_count - before.descriptors_count <= 2 * CONNECTIONS_COUNT

    def descriptors_count() -> int:
        return process_resources(server.process.pid).descriptors_count

    wait_until(lambda: descriptors_count() <= before.descriptors_count)


def test_clients_that_do_not_read_keep_nobody_out(address: str) -> None:
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(3 * CONNECTIONS_COUNT):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            slow.settimeout(30)
            slow.connect((host, int(port)))
            slow.sendall(REQUEST)
        wait_until(lambda: raw_answer(address, REQUEST).startswith(b"HTTP/1.1 200 OK\r\n"))


def test_a_hundred_handshakes_that_stop_keep_nobody_out(guarded: Guarded) -> None:
    host, _, port = guarded.address.rpartition(":")
    client = ssl.MemoryBIO()
    tls = trusting(guarded.ca).wrap_bio(ssl.MemoryBIO(), client, server_hostname=host)
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = client.read()

    with ExitStack() as stack:
        for number in range(100):
            stranger = stack.enter_context(socket.create_connection((host, int(port)), 30))
            stranger.sendall(hello[: number * len(hello) // 50])
        assert guarded.scrape("token-of-prometheus").status == 200


# The server's life


def test_they_are_told_before_the_devices_are_open_and_until_the_end(
    socket_directory: Path,
) -> None:
    settings = Settings([f"unix:{socket_directory}/s"], 2 << 20, drain_timeout_s=30, metrics_port=0)
    daemon = Daemon(settings)
    (address,) = daemon.metrics_addresses
    ready = [scrape(address).value("deconvd_ready")]
    daemon.serve(lambda: [CpuDevice(1)])
    ready.append(scrape(address).value("deconvd_ready"))
    daemon.fail()
    ready.append(scrape(address).value("deconvd_ready"))
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 30) as idle:
        assert daemon.drain()
        assert not idle.recv(1)

    assert ready == [0, 1, 0]
    with pytest.raises(OSError, match="refused"):
        scrape(address)


def test_a_drain_can_be_watched(socket_directory: Path) -> None:
    device = HoldingDevice()
    settings = Settings([f"unix:{socket_directory}/s"], 2 << 20, drain_timeout_s=60, metrics_port=0)
    daemon = Daemon(settings)
    (address,) = daemon.metrics_addresses
    daemon.serve(lambda: [device])
    with (
        ThreadPoolExecutor(1) as executor,
        deconvd_client.connect(settings.addresses[0], transport="grpc", timeout_s=60) as F,
    ):
        call = F.submit(F.deconvolution_2d, X, W)
        wait_until(lambda: scrape(address).value("deconvd_device_calls", state="running") == 1)
        drained = executor.submit(daemon.drain)
        wait_until(lambda: not scrape(address).value("deconvd_ready"))
        during = scrape(address)
        device.let_go.set()
        call.result(60)
        assert drained.result(60)

    assert during.value("deconvd_device_calls", state="running") == 1
    assert during.value("deconvd_calls_running", method="Deconvolve", transport="grpc") == 1


def test_a_port_that_another_has_is_an_error_that_names_it(socket_directory: Path) -> None:
    addresses = [f"unix:{socket_directory}/s"]
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressInUseError, match=rf"\(--metrics-port\).*port {port}"):
            Daemon(Settings(addresses, 1 << 20, drain_timeout_s=1, metrics_port=port))


def test_without_the_option_there_are_none(socket_directory: Path) -> None:
    daemon = Daemon(Settings([f"unix:{socket_directory}/s"], 2 << 20, drain_timeout_s=1))
    try:
        assert daemon.metrics_addresses == []
    finally:
        daemon.drain()
