"""Direct connections with TLS and tokens: who is served, who is not, and that nobody else notices those who are not."""

from __future__ import annotations

import datetime
import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.byte_stream import SocketStream
from deconvd.direct.connection_errors import ConnectionBrokenError, ConnectionClosedError
from deconvd.direct.events import ANY_INSTANCE, Hello, StripedCallHead, StripeHead
from deconvd.direct.tls_engine import TlsEngine
from deconvd.direct.tls_stream import TlsStream
from deconvd_client import Tls, UnauthenticatedError
from deconvd_client.transports import side_sockets
from deconvd_server.access import caller_pass
from deconvd_server.access.caller_pass import certificate_name
from deconvd_server.transports.direct import greeter
from deconvd_server.transports.direct.striped_transfer import TransferState
from tests.certificates import Authority, CertificateFiles
from tests.direct_calls import W, X, is_serving
from tests.interrupts import interrupt_at_random, interrupt_everywhere
from tests.processes import process_resources, wait_until
from tests.striped_clients import (
    LARGE,
    TWICE,
    force_stripes,
    shrink_pieces,
    wait_until_direct,
    watch_heads,
)
from tests.tls_servers import DAY, NamedTokens, SecuredServer, secured_server
from tests.tls_streams import client_context

TOKEN = "dcd_" + "t" * 43
OTHER_TOKEN = "dcd_" + "o" * 43
TRANSFER = bytes(range(16))
ATTACKER_HOST = "127.0.0.3"


@pytest.fixture(scope="module")
def tls_server(loopback_certificate: CertificateFiles) -> Iterator[SecuredServer]:
    """A server with TLS that asks nobody who it is."""
    with secured_server(loopback_certificate) as server:
        yield server


@pytest.fixture
def trust(authority: Authority) -> Tls:
    return Tls(ca=authority.ca)


def client_hello(authority: Authority) -> bytes:
    """Return what a client of TLS sends first."""
    engine = TlsEngine(client_context(authority.ca), "127.0.0.1")
    assert not engine.shake_hands()
    return engine.take_unsent()


def is_closed(connection: socket.socket) -> bool:
    """Wait until the server closes a connection, whatever it has sent before."""
    connection.settimeout(60)
    with suppress(ConnectionResetError):
        while connection.recv(1 << 16):
            pass
    return True


def check_served(server: SecuredServer, tls: Tls) -> None:
    with server.open_stream(tls) as stream:
        assert is_serving(stream)


def test_calls_go_by_direct_connections_with_tls(tls_server: SecuredServer, trust: Tls) -> None:
    check_served(tls_server, trust)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_both_versions_of_tls_are_served(
    tls_server: SecuredServer, authority: Authority, version: str
) -> None:
    context = client_context(authority.ca)
    context.maximum_version = ssl.TLSVersion[version]
    connection = socket.create_connection(tls_server.address, 30)
    with closing(TlsStream(connection, TlsEngine(context, "localhost"))) as stream:
        stream.set_deadline(30)
        stream.shake_hands()
        stream.write(Hello(ANY_INSTANCE).pack())
        target = memoryview(bytearray(28))
        stream.fill(target)
        assert bytes(target[8:12]) == b"dcd7"


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_a_handshake_may_be_cut_anywhere(
    tls_server: SecuredServer, authority: Authority, trust: Tls, share: float
) -> None:
    hello = client_hello(authority)
    with socket.create_connection(tls_server.address, 30) as connection:
        connection.sendall(hello[: int(share * len(hello))])
    wait_until(lambda: tls_server.greetings_count == 0)
    check_served(tls_server, trust)


@pytest.mark.parametrize("size_bytes", [0, 4, 8, 27])
def test_a_greeting_may_be_cut_anywhere(
    tls_server: SecuredServer, authority: Authority, trust: Tls, size_bytes: int
) -> None:
    connection = socket.create_connection(tls_server.address, 30)
    engine = TlsEngine(client_context(authority.ca), "localhost")
    with closing(TlsStream(connection, engine)) as stream:
        stream.set_deadline(30)
        stream.shake_hands()
        if size_bytes:
            stream.write(Hello(ANY_INSTANCE).pack()[:size_bytes])
        wait_until(lambda: tls_server.greetings_count == 1)
    wait_until(lambda: tls_server.greetings_count == 0)
    check_served(tls_server, trust)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_damage_that_comes_with_a_greeting_ends_that_connection_alone(
    tls_server: SecuredServer, authority: Authority, trust: Tls, version: str
) -> None:
    context = client_context(authority.ca)
    context.maximum_version = ssl.TLSVersion[version]
    engine = TlsEngine(context, "localhost")
    with socket.create_connection(tls_server.address, 30) as connection:
        with closing(TlsStream(connection.dup(), engine)) as stream:
            stream.set_deadline(30)
            stream.shake_hands()
            hello = engine.encrypt(Hello(ANY_INSTANCE).pack())
            damaged = bytearray(engine.encrypt(b"more"))
            damaged[-1] ^= 1
            connection.sendall(hello + damaged)  # both come at once
            assert is_closed(connection)
    check_served(tls_server, trust)


@pytest.mark.parametrize("what", ["nothing", "a part of TLS", "TLS and no greeting"])
def test_a_client_that_stalls_is_given_up(
    tls_server: SecuredServer,
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.setattr(greeter, "_HANDSHAKE_S", 0.3)
    with socket.create_connection(tls_server.address, 30) as connection:
        if what == "a part of TLS":
            connection.sendall(client_hello(authority)[:50])
        elif what == "TLS and no greeting":
            engine = TlsEngine(client_context(authority.ca), "localhost")
            stream = TlsStream(connection.dup(), engine)
            stream.set_deadline(30)
            stream.shake_hands()
        assert is_closed(connection)
    wait_until(lambda: tls_server.greetings_count == 0)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(Hello(ANY_INSTANCE).pack(), id="a client without TLS"),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="HTTP"),
        pytest.param(bytes(100_000), id="zeros"),
    ],
)
def test_what_is_no_tls_is_refused(tls_server: SecuredServer, trust: Tls, sent: bytes) -> None:
    with socket.create_connection(tls_server.address, 30) as connection:
        with suppress(ConnectionError):  # it was closed meanwhile
            connection.sendall(sent)
        assert is_closed(connection)
    check_served(tls_server, trust)


def test_a_client_never_falls_back_from_tls(trust: Tls) -> None:
    with secured_server(None) as server:
        with pytest.raises(ConnectionClosedError):
            server.open_stream(trust)
        with server.open_stream(None) as stream:
            assert is_serving(stream)


def test_a_client_without_tls_is_told_nothing(tls_server: SecuredServer) -> None:
    with pytest.raises(ConnectionBrokenError):
        tls_server.open_stream(None)


def test_a_server_is_trusted_only_by_its_authority_and_name(
    tls_server: SecuredServer, authority: Authority, tmp_path: Path
) -> None:
    other = Authority(tmp_path)
    for tls in (Tls(ca=other.ca), Tls(ca=authority.ca, server_name="example.org")):
        with pytest.raises(ConnectionClosedError, match="certificate cannot be trusted"):
            tls_server.open_stream(tls)
    with tls_server.open_stream(Tls(ca=authority.ca, server_name="localhost")) as stream:
        assert is_serving(stream)


@pytest.mark.parametrize(("begin", "end"), [(-2, -1), (1, 2)])
def test_a_certificate_counts_in_its_time_alone(
    authority: Authority, trust: Tls, begin: int, end: int
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    certificate = authority.issue(
        "127.0.0.1", not_before=now + begin * DAY, not_after=now + end * DAY
    )
    with secured_server(certificate) as server:
        with pytest.raises(ConnectionClosedError, match="certificate cannot be trusted"):
            server.open_stream(trust)


def test_a_certificate_is_required_without_tokens(
    loopback_certificate: CertificateFiles, authority: Authority, tmp_path: Path
) -> None:
    mine = authority.issue("client.example", common_name="alice")
    now = datetime.datetime.now(datetime.UTC)
    ended = authority.issue("client.example", not_before=now - 2 * DAY, not_after=now - DAY)
    strange = Authority(tmp_path).issue("client.example", common_name="alice")
    with secured_server(loopback_certificate, client_ca=authority.ca) as server:
        for tls in (
            Tls(ca=authority.ca),
            Tls(authority.ca, ended.cert, ended.key),
            Tls(authority.ca, strange.cert, strange.key),
        ):
            with pytest.raises(ConnectionBrokenError):
                server.open_stream(tls)
        with server.open_stream(Tls(authority.ca, mine.cert, mine.key)) as stream:
            assert is_serving(stream)
        assert server.seen.calls == [("Deconvolve", "alice", "tenant alice")]


def test_a_token_or_a_certificate_says_who_calls(
    loopback_certificate: CertificateFiles, authority: Authority
) -> None:
    mine = authority.issue("client.example")
    certain = Tls(authority.ca, mine.cert, mine.key)
    tokens = NamedTokens({TOKEN: "bob"})
    with secured_server(loopback_certificate, client_ca=authority.ca, tokens=tokens) as server:
        for token in ("", TOKEN):
            with server.open_stream(certain, token) as stream:
                assert is_serving(stream)
        assert [name for _, name, _ in server.seen.calls] == ["client.example", "bob"]
        without = Tls(authority.ca)
        for tls, token in ((certain, OTHER_TOKEN), (without, ""), (without, TOKEN)):
            with pytest.raises(ConnectionBrokenError):
                server.open_stream(tls, token)
        assert len(server.seen.calls) == 2


def test_a_name_may_have_no_null_character(authority: Authority) -> None:
    assert certificate_name({"subject": ((("commonName", "alice\0.example"),),)}) == ""
    assert certificate_name({"subjectAltName": (("IP Address", "1.2.3.4"), ("DNS", "a"))}) == "a"
    assert certificate_name({}) == ""


def test_a_certificate_whose_names_are_no_text_is_nobodys(
    loopback_certificate: CertificateFiles, authority: Authority
) -> None:
    odd = authority.issue_unchecked("alice", b"\xff\xfe")
    tls = Tls(authority.ca, odd.cert, odd.key)
    tokens = NamedTokens({TOKEN: "bob"})
    with secured_server(loopback_certificate, client_ca=authority.ca, tokens=tokens) as server:
        with pytest.raises(ConnectionBrokenError):
            server.open_stream(tls)
        with server.open_stream(tls, TOKEN) as stream:  # the thread that greets goes on
            assert is_serving(stream)
        assert [name for _, name, _ in server.seen.calls] == ["bob"]


def test_a_wrong_token_is_refused_by_unix_sockets_too(
    socket_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = socket_directory / "deconvd.sock"
    tokens = NamedTokens({TOKEN: "bob"})
    with secured_server(None, tokens=tokens, unix_path=path) as server:
        for token, name in ((TOKEN, "bob"), ("", "")):
            with deconvd_client.connect(f"unix:{path}", token=token or None) as F:
                wait_until(lambda: bool(F.deconvolution_2d(X, W).shape) and is_direct(F))
            assert server.seen.calls[-1][1] == name
        seen_count = len(server.seen.calls)
        with deconvd_client.connect(f"unix:{path}", token=OTHER_TOKEN) as F:
            with pytest.raises(UnauthenticatedError):
                F.deconvolution_2d(X, W)
            assert not is_direct(F)
        assert len(server.seen.calls) == seen_count
    for token in (TOKEN, OTHER_TOKEN):
        assert token not in caplog.text


def is_direct(F: deconvd_client.Connection) -> bool:
    """Return whether there is a direct connection."""
    text = repr(F)
    return "direct connection" in text and "no direct connection" not in text


def call_until_direct(F: deconvd_client.Connection) -> None:
    """Call until there is a direct connection: the first calls may not wait for it. Then call by it."""

    def call() -> bool:
        F.deconvolution_2d(X, W)
        return is_direct(F)

    wait_until(call)
    call()


def test_a_client_whose_direct_connection_is_refused_hears_why_by_grpc(
    loopback_certificate: CertificateFiles, trust: Tls
) -> None:
    tokens = NamedTokens({TOKEN: "bob"})
    with secured_server(loopback_certificate, tokens=tokens) as server:
        with server.connect(trust, token=OTHER_TOKEN) as F:
            with pytest.raises(UnauthenticatedError, match="token must be one"):
                F.deconvolution_2d(X, W)


def test_a_revoked_token_ends_the_connection(
    loopback_certificate: CertificateFiles, trust: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_pass, "_CHECK_PERIOD_S", 0.0)
    tokens = NamedTokens({TOKEN: "bob", OTHER_TOKEN: "alice"})
    with secured_server(loopback_certificate, tokens=tokens) as server:
        with (
            server.open_stream(trust, TOKEN) as stream,
            server.open_stream(trust, OTHER_TOKEN) as other,
            server.connect(trust, token=TOKEN) as F,
        ):
            call_until_direct(F)
            assert is_serving(stream)
            del tokens[TOKEN]
            with pytest.raises(ConnectionClosedError):
                is_serving(stream)
            with pytest.raises(UnauthenticatedError):
                F.deconvolution_2d(X, W)
            assert is_serving(other)


def test_an_idle_connection_of_a_revoked_token_is_closed(
    loopback_certificate: CertificateFiles, trust: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_pass, "_CHECK_PERIOD_S", 0.0)
    tokens = NamedTokens({TOKEN: "bob"})
    with secured_server(loopback_certificate, tokens=tokens) as server:
        with server.open_stream(trust, TOKEN) as stream:
            assert is_serving(stream)
            assert stream.is_quiet()
            tokens.clear()
            assert stream.poll(30)
            assert not stream.is_quiet()


def test_certificates_change_under_load_without_a_failed_call(
    authority: Authority,
    trust: Tls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deconvd.host.watched_files._CHECK_PERIOD_S", 0.0)
    served = authority.issue("127.0.0.1")
    with secured_server(served) as server, ThreadPoolExecutor(2) as pool:
        stop = threading.Event()

        def call_until_stopped() -> int:
            calls_count = 0
            with server.connect(trust) as F:
                while not stop.is_set() or not calls_count:
                    np.testing.assert_array_equal(F.deconvolution_2d(X, W), expected)
                    calls_count += is_direct(F)
            return calls_count

        with server.connect(trust) as F:
            expected = F.deconvolution_2d(X, W)
        callers = [pool.submit(call_until_stopped) for _ in range(2)]
        try:
            with server.open_stream(trust) as old:
                for _ in range(3):
                    authority.issue("127.0.0.1", "rotated.example").take_place_of(served)
                    wait_until(lambda: names_of(server, authority) >= {"rotated.example"})
                    assert is_serving(old)
        finally:
            stop.set()
        assert all(caller.result() > 0 for caller in callers)


def names_of(server: SecuredServer, authority: Authority) -> set[str]:
    """Return the names in the certificate that a server shows."""
    engine = TlsEngine(client_context(authority.ca), "127.0.0.1")
    connection = socket.create_connection(server.address, 30)
    with closing(TlsStream(connection, engine)) as stream:
        stream.set_deadline(30)
        stream.shake_hands()
        return {name for _, name in engine.peer_certificate["subjectAltName"]}


def test_striped_calls_with_tls_have_the_same_bits(
    tls_server: SecuredServer, trust: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_stripes(monkeypatch, 2)
    shrink_pieces(monkeypatch)
    heads = watch_heads(monkeypatch)
    with tls_server.connect(trust) as F:
        wait_until_direct(F, heads)
        for _ in range(2):
            y = F.deconvolution_2d(LARGE, TWICE)
            np.testing.assert_array_equal(y, 2 * LARGE)
        assert [type(head) for head in heads] == [StripedCallHead] * 2


def test_streams_with_tls_have_the_same_bits(
    tls_server: SecuredServer, trust: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_stripes(monkeypatch, 0)
    heads = watch_heads(monkeypatch)
    with tls_server.connect(trust) as F:
        wait_until_direct(F, heads)
        np.testing.assert_array_equal(F.deconvolution_2d(LARGE, TWICE), 2 * LARGE)
        assert len(heads) == 1


def test_a_stripe_of_another_identity_joins_no_call(
    loopback_certificate: CertificateFiles, trust: Tls
) -> None:
    tokens = NamedTokens({TOKEN: "bob", OTHER_TOKEN: "alice"})
    with secured_server(loopback_certificate, tokens=tokens) as server:
        with (
            server.open_stream(trust, TOKEN) as first,
            server.open_stream(trust, OTHER_TOKEN) as second,
        ):
            transfers = server.direct._transfers._transfers
            first.send(StripeHead(TRANSFER))
            second.send(StripeHead(TRANSFER))
            # each waits for a call of its own: an id that another identity uses is as good as a new one
            wait_until(lambda: len(transfers) == 2)
            for peer_key in ("tenant bob", "tenant alice"):
                transfer = transfers.get(TRANSFER, peer_key)
                assert transfer is not None
                assert transfer.peer_key == peer_key
                assert transfer.state is TransferState.EXPECTED
                assert len(transfer._members) == 1


def test_a_thousand_slow_handshakes_stop_nobody(
    tls_server: SecuredServer, authority: Authority, trust: Tls
) -> None:
    hello = client_hello(authority)
    before = process_resources(os.getpid())
    with ExitStack() as stack:
        for number in range(1000):
            host = ATTACKER_HOST if number % 2 else "127.0.0.1"  # that of the honest client, too
            slow = stack.enter_context(socket.create_connection(tls_server.address, 30, (host, 0)))
            slow.sendall(hello[: number % len(hello)])
            if number % 100 == 99:
                check_served(tls_server, trust)
        wait_until(lambda: tls_server.greetings_count <= greeter._GREETINGS_COUNT)
        with tls_server.connect(trust) as F:
            call_until_direct(F)
        among = process_resources(os.getpid())
        # each end here has a descriptor, and those that are greeted have one there
        assert among.descriptors_count - before.descriptors_count <= (
            1000 + greeter._GREETINGS_COUNT + 100
        )
        assert among.threads_count - before.threads_count < 30
        assert among.memory_bytes - before.memory_bytes < 64 << 20
    wait_until(lambda: tls_server.greetings_count == 0)


def test_the_oldest_greeting_makes_room_for_others_of_its_peer(
    tls_server: SecuredServer, trust: Tls
) -> None:
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection(tls_server.address, 30))
            for _ in range(greeter._GREETINGS_COUNT)
        ]
        check_served(tls_server, trust)
        assert is_closed(slow[0])


def forget_owners(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all files that this process makes belong to a stranger."""
    monkeypatch.setattr(side_sockets, "_ROOT", -1)
    monkeypatch.setattr(os, "geteuid", lambda: -2)


def test_credentials_go_to_no_socket_of_a_stranger(
    socket_directory: Path,
    loopback_certificate: CertificateFiles,
    trust: Tls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = socket_directory / "deconvd.sock"
    tokens = NamedTokens({TOKEN: "bob"})
    with secured_server(loopback_certificate, tokens=tokens, unix_path=path) as server:
        with server.connect(trust, token=TOKEN, transport="unix") as F:
            F.deconvolution_2d(X, W)
        with server.connect(trust, token=TOKEN, transport="auto") as F:
            wait_until(F._server.lends_memory)  # which it may not know within a call's patience
        forget_owners(monkeypatch)
        with server.connect(trust, token=TOKEN, transport="unix") as F:
            with pytest.raises(deconvd_client.UnavailableError, match="must belong to user"):
                F.deconvolution_2d(X, W)
        for transport in ("auto", "tcp"):
            with server.connect(trust, token=TOKEN, transport=transport) as F:
                call_until_direct(F)
                assert "by TCP" in repr(F)
                assert not F._server.lends_memory()
        with deconvd_client.connect(
            f"unix:{path}", token=TOKEN
        ) as F:  # it was told to use this one
            call_until_direct(F)
            wait_until(F._server.lends_memory)  # which it may not know within a call's patience


def test_a_client_without_credentials_uses_any_socket(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = socket_directory / "deconvd.sock"
    forget_owners(monkeypatch)
    with secured_server(None, unix_path=path) as server:
        with server.connect(None, transport="unix") as F:
            F.deconvolution_2d(X, W)


def test_a_stream_without_tls_is_as_it_was(tls_server: SecuredServer) -> None:
    with secured_server(None) as server, server.open_stream(None) as stream:
        assert type(stream._stream) is SocketStream


def test_calls_are_right_wherever_an_interrupt_strikes(
    tls_server: SecuredServer, trust: Tls
) -> None:
    with tls_server.connect(trust) as F:
        call_until_direct(F)
        expected = F.deconvolution_2d(X, W)
        interrupts_count = 0
        for _ in interrupt_everywhere(lambda: F.deconvolution_2d(X, W)):
            np.testing.assert_array_equal(F.deconvolution_2d(X, W), expected)
            interrupts_count += 1
        assert interrupts_count > 100
        call_until_direct(F)


def test_streams_are_right_whenever_interrupts_strike(
    tls_server: SecuredServer, trust: Tls, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_stripes(monkeypatch, 0)
    x = LARGE[:4]
    chance = random.Random(0)
    with tls_server.connect(trust) as F:
        call_until_direct(F)
        began_s = time.monotonic()
        F.deconvolution_2d(x, TWICE)
        usual_s = time.monotonic() - began_s
        for _ in range(10):
            interrupt_at_random(lambda: F.deconvolution_2d(x, TWICE), chance, usual_s)
            np.testing.assert_array_equal(F.deconvolution_2d(x, TWICE), 2 * x)
