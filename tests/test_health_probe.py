"""deconvd-health: what a container's health check runs every few seconds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, cycle
from pathlib import Path

import pytest

from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.tokens import TokenFile
from deconvd_server.daemon import Daemon
from deconvd_server.health_probe import read_health
from deconvd_server.settings import Settings
from tests.certificates import CertificateFiles
from tests.http2 import frame
from tests.secured_servers import certified, health_server, secured_process
from tests.servers import ServerProcess, free_port, stop_server
from tests.token_calls import write_tokens

COMMAND = Path(sys.executable).with_name("deconvd-health")
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY = 0, 1, 3, 4, 6, 7
_END_STREAM = 1

SETTINGS = frame(_SETTINGS, 0, 0, b"")
ANSWER = b"\0\0\0\0\2\x08\1"


def probe(*arguments: str, target: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command, with a target in its environment."""
    return subprocess.run(
        [COMMAND, *arguments],
        env={**os.environ, "DECONVD_TARGET": target},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@contextmanager
def peer_that_sends(*pieces: bytes, is_endless: bool = False) -> Iterator[str]:
    """Have a server for the block that sends this to its client, once or again and again, and then closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):  # the client may leave first
                for piece in chain(pieces, cycle(pieces) if is_endless else ()):
                    connection.sendall(piece)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def test_a_server_that_serves_is_healthy(server: ServerProcess) -> None:
    by_argument, by_environment = probe(server.target), probe(target=server.target)

    assert (by_argument.returncode, by_argument.stderr) == (0, "")
    assert by_argument.stdout == by_environment.stdout == f"{server.target}: SERVING\n"


def test_a_server_that_does_not_serve_yet_is_not_healthy(socket_directory: Path) -> None:
    address = f"unix://{socket_directory}/s"
    daemon = Daemon(Settings([address], 2 << 20, drain_timeout_s=1))
    try:
        ended = probe(address)
    finally:
        daemon.drain()

    assert (ended.returncode, ended.stdout) == (1, f"{address}: NOT_SERVING\n")


def test_where_tcp_wants_tls_and_a_token_it_asks_by_unix_and_by_the_port_for_health(
    tmp_path: Path, loopback_certificate: CertificateFiles
) -> None:
    tokens = tmp_path / "tokens"
    write_tokens(tokens, {"a-token-that-probes-do-not-have": "team-a"})
    with secured_process(
        tmp_path,
        listen=["127.0.0.1:0", "unix"],
        tokens=tokens,
        health_port=0,
        **certified(loopback_certificate),
    ) as running:
        tls, unix, health = map(probe, running.targets)

    assert (unix.returncode, health.returncode) == (0, 0)
    assert (tls.returncode, tls.stdout) == (1, "")
    assert "the server closed the connection: a port with TLS does so" in tls.stderr


def test_where_a_token_is_wanted_in_plain_text_it_says_so(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "tokens", {"a-token-that-probes-do-not-have": "team-a"})
    with health_server(authenticator=Authenticator(TokenFile(tokens))) as address:
        ended = probe(address)

    assert ended.returncode == 1
    assert "it may want a token" in ended.stderr


@pytest.mark.parametrize("target", ["unix:/nonexistent/deconvd.sock", "127.0.0.1"])
def test_a_server_that_nobody_runs_is_one_line(target: str) -> None:
    target = target if "unix" in target else f"{target}:{free_port()}"

    ended = probe(target)

    assert ended.returncode == 1
    assert ended.stderr.startswith(f"deconvd-health: {target}: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_server_that_stands_still_is_not_healthy(server: ServerProcess) -> None:
    with stop_server(server), pytest.raises(TimeoutError):
        read_health(server.target, timeout_s=0.2)


def test_a_server_that_talks_for_ever_gets_no_longer_than_one_that_is_silent() -> None:
    with peer_that_sends(SETTINGS, is_endless=True) as target, pytest.raises(TimeoutError):
        read_health(target, timeout_s=0.2)


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(_GOAWAY, 0, 0, bytes(8)),
        frame(_RESET, 0, 1, bytes(4)),
        frame(_DATA, _END_STREAM, 1, ANSWER + b"\x08\1"),
        frame(_DATA, _END_STREAM, 1, bytes(5)),
        frame(_DATA, 0, 1, ANSWER),
        frame(_DATA, _END_STREAM, 1, ANSWER)[:-1],
        frame(_HEADERS, _END_STREAM, 1, b""),
    ],
    ids=["nothing", "HTTP/1", "goaway", "reset", "long", "unknown", "no end", "half", "headers"],
)
def test_what_is_no_answer_is_not_healthy(sent: bytes) -> None:
    with peer_that_sends(SETTINGS, sent) as target, pytest.raises(ConnectionError):
        read_health(target)


def test_an_answer_may_come_in_pieces_amid_other_frames() -> None:
    pieces = (
        frame(_DATA, 0, 1, ANSWER[:3]),
        frame(_PING, 0, 0, bytes(8)),
        frame(_DATA, 0, 1, ANSWER[3:]),
        frame(_HEADERS, _END_STREAM, 1, b""),
    )
    with peer_that_sends(SETTINGS, *pieces) as target:
        assert read_health(target) == "SERVING"


@pytest.mark.parametrize(
    "arguments",
    [
        ["gpu-host"],
        ["gpu-host:health"],
        [":1"],
        ["a:1", "b:1"],
        ["a:1,b:1"],
        ["dns:///a:1"],
        ["proxy:///a:1"],
        ["a..b:1"],
        ["a:65536"],
        ["a:0"],
        ["a:" + "1" * 5000],
        ["unix:"],
    ],
    ids=lambda arguments: arguments[-1][:20],
)
def test_a_wrong_target_is_an_error_with_the_usage(arguments: list[str]) -> None:
    ended = probe(*arguments)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("Usage: deconvd-health [TARGET]")
    assert arguments[-1] in ended.stderr.splitlines()[-1]


def test_help_names_what_it_takes() -> None:
    ended = probe("--help")

    assert ended.returncode == 0
    assert all(word in ended.stdout for word in ("TARGET", "DECONVD_TARGET", "Exit codes"))
