"""A server whose metrics Prometheus may read: with TLS, tokens and little memory, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.certificates import write_certificate
from benchmarks.ports import free_port
from deconvd.host.startup_line import address_in_startup_line
from deconvd_client import Tls
from deconvd_server.access.tokens import TokenHash, new_token

__all__ = ["READER", "TENANTS", "WatchedServer", "watched_server"]

READER: Final = "prometheus"
"""The identity that sees the calls of all tenants."""

TENANTS: Final = ("alice", "bob")
"""Identities that make calls."""

_END_TIMEOUT_S: Final = 60
"""Longer than a drain takes."""

_HOST: Final = "127.0.0.1"
_LIMITS: Final = ("--threads=1", "--device-memory-bytes=64Mi", "--resident-memory-bytes=1Mi")
"""So little that it runs short of everything soon."""


@dataclass(frozen=True)
class WatchedServer:
    """A running server.

    Attributes:
        unix_target, tcp_target: What clients connect to: without TLS and tokens, and with both.
        metrics_address: Where Prometheus reads metrics: ``host:port``.
        ca: File with the certificate of the server's authority.
        token_files: Files with the token of each identity.
    """

    unix_target: str
    tcp_target: str
    metrics_address: str
    ca: Path
    token_files: dict[str, Path]

    @property
    def tls(self) -> Tls:
        """How a client knows it."""
        return Tls(ca=self.ca)

    def token(self, name: str) -> str:
        """Return the token of an identity."""
        return self.token_files[name].read_text()


@contextmanager
def watched_server(
    directory: Path, *options: str, module: Sequence[str] = ("-m", "deconvd_server")
) -> Iterator[WatchedServer]:
    """Run a server for the block.

    Args:
        directory: Where its keys, its socket and its log go: a directory that exists.
        options: Further options of ``deconvd-server``.
        module: The words by which Python runs it.
    """
    cert, key, ca = write_certificate(directory, _HOST)
    tokens, token_files = _make_tokens(directory)
    port = free_port()
    command = [
        sys.executable,
        *module,
        "--device=cpu",
        *_LIMITS,
        f"--listen=unix:{directory}/deconvd.sock",
        f"--listen={_HOST}:0",
        f"--tls-cert={cert}",
        f"--tls-key={key}",
        f"--tokens={tokens}",
        f"--metrics-port={port}",
        f"--metrics-readers={READER}",
        *options,
    ]
    log = directory / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        if not all(lines):
            raise RuntimeError(f"the server did not start:\n{log.read_text()}")
        unix, tcp = map(address_in_startup_line, lines)
        yield WatchedServer(unix, tcp, f"{_HOST}:{port}", ca, token_files)
    finally:
        process.terminate()
        process.wait(_END_TIMEOUT_S)
        process.communicate()


def _make_tokens(directory: Path) -> tuple[Path, dict[str, Path]]:
    """Return a server's file of tokens, and a file with each token."""
    tokens = {name: new_token() for name in (READER, *TENANTS)}
    hashes = directory / "tokens.txt"
    hashes.touch(0o600)
    hashes.write_text("".join(f"{TokenHash.of(*item).as_line()}\n" for item in tokens.items()))
    files = {name: directory / f"{name}.token" for name in tokens}
    for name, file in files.items():
        file.touch(0o600)
        file.write_text(tokens[name])
    return hashes, files
