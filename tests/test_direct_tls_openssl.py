"""Direct connections with TLS whose peer is OpenSSL's own server, which does what Python's `ssl` cannot."""

from __future__ import annotations

import fcntl
import shutil
import socket
import ssl
import subprocess
import termios
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.direct.tls_engine import TlsEngine
from deconvd.direct.tls_stream import TlsStream
from tests.certificates import Authority, CertificateFiles
from tests.processes import wait_until
from tests.servers import free_port
from tests.tls_streams import client_context, taken


class OpenSslServer:
    """``openssl s_server``: what it reads from its standard input, it sends, or does."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self.port = port
        self._output = bytearray()
        threading.Thread(target=self._collect, daemon=True).start()

    def do(self, line: bytes) -> None:
        """Give it one line, and wait until it has read it: what it reads together, it takes for one."""
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(line)
        stdin.flush()
        wait_until(lambda: not any(fcntl.ioctl(stdin, termios.FIONREAD, bytes(4))))

    def has_printed(self, text: bytes) -> bool:
        return text in self._output

    def _collect(self) -> None:
        output: IO[bytes] | None = self.process.stdout
        assert output is not None
        while data := output.read1(1000):  # type: ignore[attr-defined]  # it is buffered
            self._output += data


@contextmanager
def openssl_server(certificate: CertificateFiles, *options: str) -> Iterator[OpenSslServer]:
    port = free_port()
    files = ["-cert", str(certificate.cert), "-key", str(certificate.key)]
    with subprocess.Popen(
        ["openssl", "s_server", "-accept", f"127.0.0.1:{port}", *files, *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        server = OpenSslServer(process, port)
        try:
            wait_until(lambda: server.has_printed(b"ACCEPT"))
            yield server
        finally:
            process.kill()


@contextmanager
def stream_to(server: OpenSslServer, ca: Path) -> Iterator[TlsStream]:
    context = client_context(ca)
    context.options |= ssl.OP_NO_RENEGOTIATION
    connection = socket.create_connection(("127.0.0.1", server.port), 30)
    with closing(TlsStream(connection, TlsEngine(context, "127.0.0.1"))) as stream:
        stream.set_deadline(60)
        stream.shake_hands()
        yield stream


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not there")


@needs_openssl
def test_new_keys_are_no_data_and_are_answered(
    authority: Authority, loopback_certificate: CertificateFiles
) -> None:
    with (
        openssl_server(loopback_certificate, "-tls1_3") as server,
        stream_to(server, authority.ca) as stream,
    ):
        stream.write(b"begin\n")
        wait_until(lambda: server.has_printed(b"begin\n"))
        assert not stream.poll(0)  # the tickets of its sessions
        for number in range(3):
            server.do(b"K\n")
            server.do(b"with new keys %d\n" % number)
            assert taken(stream, 16) == b"with new keys %d\n" % number
            stream.write(b"answer %d\n" % number)
            wait_until(partial(server.has_printed, b"answer %d\n" % number))
        assert not stream.poll(0)


@needs_openssl
def test_a_peer_that_asks_for_new_keys_without_end_is_given_up(
    authority: Authority, loopback_certificate: CertificateFiles
) -> None:
    with (
        openssl_server(loopback_certificate, "-tls1_3") as server,
        stream_to(server, authority.ca) as stream,
        ThreadPoolExecutor(1) as pool,
    ):
        stream.write(b"begin\n")
        wait_until(lambda: server.has_printed(b"begin\n"))
        reading = pool.submit(taken, stream, 1)
        while not reading.done():
            with suppress(BrokenPipeError):  # it has ended, since its client has
                server.do(b"K\n")
        with pytest.raises(ConnectionClosedError, match="messages of TLS, and no data"):
            reading.result()


@needs_openssl
def test_a_second_handshake_is_refused(
    authority: Authority, loopback_certificate: CertificateFiles
) -> None:
    with (
        openssl_server(loopback_certificate, "-tls1_2") as server,
        stream_to(server, authority.ca) as stream,
    ):
        stream.write(b"begin\n")
        wait_until(lambda: server.has_printed(b"begin\n"))
        server.do(b"r\n")
        server.do(b"more\n")
        assert taken(stream, 5) == b"more\n"
