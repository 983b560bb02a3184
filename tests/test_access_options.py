"""Who may call, by the server's options: what is refused beyond this host, and what the first lines say."""

from __future__ import annotations

import os
import shlex
import socket
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from deconvd.errors import InvalidArgumentError
from deconvd.host.startup_line import address_in_startup_line, startup_line
from deconvd_server.access.exposure import is_beyond_loopback, name_in_certificate
from deconvd_server.access.tokens import TokenHash
from deconvd_server.access_options import AccessPolicy, ExposedAddressError, load_access_policy
from tests.certificates import Authority, CertificateFiles
from tests.servers import free_port, server_process


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.txt"
    path.write_text(TokenHash.of("alice", "secret").as_line())
    path.chmod(0o600)
    return path


def load(
    *addresses: str,
    certificate: CertificateFiles | None = None,
    client_ca: Path | None = None,
    tokens: Path | None = None,
    is_insecure: bool = False,
) -> AccessPolicy:
    return load_access_policy(
        addresses,
        tls_cert=None if certificate is None else certificate.cert,
        tls_key=None if certificate is None else certificate.key,
        tls_client_ca=client_ca,
        tokens=tokens,
        is_insecure=is_insecure,
    )


@pytest.mark.parametrize(
    ("host", "is_beyond"),
    [
        ("127.0.0.1", False),
        ("127.8.9.1", False),
        ("localhost", False),
        ("[::1]", False),
        ("::ffff:127.0.0.1", False),
        ("0.0.0.0", True),
        ("[::]", True),
        ("0", True),  # an old form of 0.0.0.0
        ("192.0.2.1", True),
        ("[2001:db8::1]", True),
        ("[::ffff:192.0.2.1]", True),
        ("[fe80::1%lo]", True),
    ],
)
def test_only_the_loopback_is_this_host_alone(host: str, is_beyond: bool) -> None:
    assert is_beyond_loopback(host) == is_beyond


@pytest.mark.parametrize("found", [["192.0.2.1"], ["127.0.0.1", "192.0.2.1"]])
def test_a_name_is_what_it_resolves_to(found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, _port: None, **_: object) -> list[tuple[object, ...]]:
        assert host == "gpu-host"
        return [(2, 1, 6, "", (ip, 0)) for ip in found]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    assert is_beyond_loopback("gpu-host")


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 100])
def test_a_name_that_does_not_resolve_is_told(host: str) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {host}:1: "):
        load(f"{host}:1")


def test_what_a_certificate_should_call_a_host() -> None:
    assert name_in_certificate("gpu-host") == ("DNS", "gpu-host")
    assert name_in_certificate("[2001:db8::1]") == ("IP", "2001:db8::1")
    assert name_in_certificate("0.0.0.0") == name_in_certificate("[::]")
    assert name_in_certificate("0.0.0.0") == ("DNS", socket.gethostname())


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:50051"])
def test_other_hosts_need_tls_and_a_proof_unless_strangers_are_welcome(
    address: str, tokens: Path, loopback_certificate: CertificateFiles, authority: Authority
) -> None:
    certificate = loopback_certificate

    with pytest.raises(ExposedAddressError, match="Type these two lines"):
        load("127.0.0.1:0", address)
    with pytest.raises(ExposedAddressError):
        load(address, tokens=tokens)
    with pytest.raises(ExposedAddressError):
        load(address, certificate=certificate)

    assert load(address, certificate=certificate, tokens=tokens).tls is not None
    by_certificate = load(address, certificate=certificate, client_ca=authority.ca).tls
    assert by_certificate is not None
    assert by_certificate.requires_certificates
    both = load(address, certificate=certificate, client_ca=authority.ca, tokens=tokens).tls
    assert both is not None
    assert both.requires_certificates
    assert load(address, is_insecure=True).tls is None


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0", "unix:a.sock"])
def test_this_host_needs_nothing(address: str) -> None:
    policy = load(address)

    assert policy.tls is None
    assert policy.authenticator.identify("peer", token="", certificate_name="", is_local=False) == (
        "",
        "peer",
    )


def test_tokens_count_even_if_strangers_were_welcome(tokens: Path) -> None:
    authenticator = load("0.0.0.0:0", tokens=tokens, is_insecure=True).authenticator

    with pytest.raises(PermissionError):
        authenticator.identify("peer", token="", certificate_name="", is_local=False)


@pytest.mark.parametrize(
    ("given", "described"),
    [
        ((), "not encrypted; callers: everyone on this host"),
        (("is_insecure",), "not encrypted; callers: everyone on this host"),
        (("tokens",), "not encrypted; callers: tokens of {tokens}"),
        (("certificate",), "TLS; callers: everyone on this host"),
        (("certificate", "client_ca"), "TLS; callers: certificates of {client_ca}"),
        (
            ("certificate", "client_ca", "tokens"),
            "TLS; callers: certificates of {client_ca}, with tokens of {tokens} or without",
        ),
    ],
)
def test_it_is_said_who_may_call(
    given: tuple[str, ...],
    described: str,
    tokens: Path,
    loopback_certificate: CertificateFiles,
    authority: Authority,
) -> None:
    values: dict[str, Any] = {
        "tokens": tokens,
        "certificate": loopback_certificate,
        "client_ca": authority.ca,
        "is_insecure": True,
    }
    options = {name: values[name] for name in given}

    policy = load("127.0.0.1:0", "unix:a.sock", **options)

    assert policy.describe("127.0.0.1:50051") == described.format(**values)
    assert policy.describe("unix:a.sock") == "callers: all users who may open the socket"


def test_it_is_said_if_strangers_may_call() -> None:
    policy = load("0.0.0.0:0", "127.0.0.1:0", is_insecure=True)

    assert policy.describe("0.0.0.0:1") == "not encrypted; callers: everyone who can reach it"
    assert policy.describe("127.0.0.1:1") == "not encrypted; callers: everyone on this host"


def test_the_key_is_in_no_text(loopback_certificate: CertificateFiles) -> None:
    policy = load("127.0.0.1:0", certificate=loopback_certificate)
    assert policy.tls is not None

    text = f"{policy!r}{policy.tls!r}{policy.tls.current()!r}"

    assert not any(line in text for line in loopback_certificate.key.read_text().splitlines())


def test_an_option_that_lacks_another_or_whose_file_is_wrong_is_blamed(
    tmp_path: Path, tokens: Path, loopback_certificate: CertificateFiles, authority: Authority
) -> None:
    cert, key = loopback_certificate.cert, loopback_certificate.key
    absent, text, pipe = (tmp_path / name for name in ("absent.pem", "text.pem", "pipe"))
    os.mkfifo(pipe)  # which nobody writes into
    text.write_text("no PEM")
    other = authority.issue("localhost")
    encrypted = tmp_path / "encrypted.pem"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:x", "-in", str(key)]
    subprocess.run([*command, "-out", str(encrypted)], check=True, capture_output=True)
    none: dict[str, Path | None] = dict.fromkeys(
        ("tls_cert", "tls_key", "tls_client_ca", "tokens"), None
    )
    for options, argument, message in (
        ({"tls_cert": cert}, "tls_cert", "--tls-cert needs --tls-key"),
        ({"tls_key": key}, "tls_key", "--tls-key needs --tls-cert"),
        ({"tls_client_ca": cert}, "tls_client_ca", "--tls-client-ca needs --tls-cert"),
        ({"tls_cert": absent, "tls_key": key}, "tls_cert", f"got {absent}: No such file"),
        ({"tls_cert": cert, "tls_key": absent}, "tls_key", f"got {absent}: No such file"),
        ({"tls_cert": text, "tls_key": key}, "tls_cert", "must be files with certificates"),
        ({"tls_cert": cert, "tls_key": other.key}, "tls_cert", "must be files with certificates"),
        (
            {"tls_cert": cert, "tls_key": encrypted},
            "tls_cert",
            "the key is encrypted, and must not",
        ),
        (
            {"tls_cert": cert, "tls_key": key, "tls_client_ca": text},
            "tls_cert",
            "--tls-key and --tls-client-ca must be files with certificates",
        ),
        ({"tokens": absent}, "tokens", f"--tokens must be a file that can be read, got {absent}"),
        ({"tls_cert": pipe, "tls_key": key}, "tls_cert", f"{pipe}: it must be a regular file"),
        ({"tls_cert": cert, "tls_key": pipe}, "tls_cert", f"{pipe}: it must be a regular file"),
        ({"tokens": pipe}, "tokens", f"{pipe}: it must be a regular file"),
        ({"tokens": text}, "tokens", f"--tokens must be a file of tokens: {text}: line 1 must"),
    ):
        with pytest.raises(InvalidArgumentError) as raised:
            load_access_policy(["127.0.0.1:0"], **(none | options), is_insecure=False)
        assert message in str(raised.value)
        assert raised.value.argument == argument


def run_server(*options: str) -> subprocess.CompletedProcess[str]:
    """Run a server that must end by itself."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "deconvd_server", "--device", "cpu", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_key_that_grpc_refuses_and_openssl_takes_is_named(
    tmp_path: Path, loopback_certificate: CertificateFiles
) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(b"\0\n" + loopback_certificate.key.read_bytes())

    files = "--tls-cert", str(loopback_certificate.cert), "--tls-key", str(key)
    ended = run_server("--listen", "127.0.0.1:0", *files)

    assert ended.returncode == 2
    assert "--tls-cert, --tls-key and --tls-client-ca must be PEM that gRPC takes" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_two_lines_that_a_refusal_names_make_what_the_server_wants(tmp_path: Path) -> None:
    ended = run_server("--listen", "127.0.0.1:0", "--listen", "0.0.0.0:0")
    assert ended.returncode == 2
    first, *lines = ended.stderr.splitlines()
    assert first.startswith("Error: other hosts can reach 0.0.0.0:0, so the server must know")
    assert len(lines) == 2

    for line in lines:
        command = line.replace("deconvd-server", f"{sys.executable} -m deconvd_server")
        subprocess.run(shlex.split(command), cwd=tmp_path, check=True, capture_output=True)

    files = (("--tls-cert", "cert.pem"), ("--tls-key", "key.pem"), ("--tokens", "tokens.txt"))
    for _, name in files:
        assert name in first
    options = [word for option, name in files for word in (option, str(tmp_path / name))]
    with server_process(tmp_path, *options, listen=("0.0.0.0:0",)) as server:
        assert server.target.startswith("0.0.0.0:")
    context = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT  # as Python 3.13 does by itself
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    shake_hands(context, served, socket.gethostname())


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> None:
    """Let two ends of TLS meet in memory."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in tuple(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)


def test_strangers_are_welcome_if_the_server_is_told_so(tmp_path: Path) -> None:
    with server_process(tmp_path, "--insecure", listen=("0.0.0.0:0",)) as server:
        assert server.target.startswith("0.0.0.0:")


def test_health_alone_is_for_everyone_on_a_port_of_its_own(tmp_path: Path, tokens: Path) -> None:
    port = free_port()
    options = "--tokens", str(tokens), "--health-port", str(port)
    with server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as server:
        assert server.process.stdout is not None
        said = server.process.stdout.readline()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
            answer = check(b"", timeout=10)

    assert (
        said == f"deconvd-server: health alone on 127.0.0.1:{port} (not encrypted; for everyone)\n"
    )
    assert answer == b"\x08\x01"  # SERVING


def test_a_program_finds_the_address_in_a_startup_line() -> None:
    for address in ("127.0.0.1:50051", "unix:/tmp/a (b) on c.sock"):
        line = startup_line(address, "TLS; callers: tokens of t.txt")
        assert line.startswith(f"deconvd-server: listening on {address} (TLS")
        assert address_in_startup_line(line + "\n") == address
    for line in ("", "deconvd-server: listening on nothing", "hello (x)"):
        with pytest.raises(ValueError, match="where deconvd-server listens was expected"):
            address_in_startup_line(line)
