"""Servers with TLS and tokens for tests: whole ones in processes of their own, and gRPC with health in this one."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deconvd.host import watched_files
from deconvd_server.access.authenticator import Authenticator
from deconvd_server.access.server_tls import ServerTls
from deconvd_server.access.tokens import TokenFile
from deconvd_server.daemon import Daemon
from deconvd_server.device.cpu import CpuDevice
from deconvd_server.log_text import LogFormatter
from deconvd_server.residents import ResidentLimits
from deconvd_server.settings import Settings
from deconvd_server.transports.grpc.callers import CallerReader
from deconvd_server.transports.grpc.health import Health
from deconvd_server.transports.grpc.server import GrpcServer
from deconvd_server.transports.grpc.tls import server_credentials
from deconvd_server.transports.listen import bind
from tests.certificates import CertificateFiles
from tests.servers import ServerProcess

__all__ = ["certified", "health_server", "secured_process", "server_tls"]

QUICK_S = 0.02
"""How often files are looked at in tests."""

_END_TIMEOUT_S = 30


def server_tls(files: CertificateFiles, client_ca: Path | None = None) -> ServerTls:
    """Return TLS with a certificate."""
    return ServerTls(files.cert, files.key, client_ca)


def certified(files: CertificateFiles, client_ca: Path | None = None) -> dict[str, str]:
    """Return the options of `secured_process` for TLS with a certificate."""
    options = {"cert": str(files.cert), "key": str(files.key)}
    return options | ({"client_ca": str(client_ca)} if client_ca else {})


@contextmanager
def secured_process(
    directory: Path, *, listen: Sequence[str] = ("127.0.0.1:0",), **options: object
) -> Iterator[ServerProcess]:
    """Run a server on the CPU for the block, which logs at DEBUG.

    Args:
        listen: Its addresses; ``unix`` for a socket in `directory`.
        options: ``cert``, ``key`` and ``client_ca`` of TLS, ``tokens``, the file of tokens, ``health_port``, and
            ``lease_s``, how long a session lives without a heartbeat.
    """
    addresses = [f"unix:{directory}/deconvd.sock" if one == "unix" else one for one in listen]
    words = json.dumps({"addresses": addresses, **options}, default=os.fspath)
    log = directory / "server.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", __name__, words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield ServerProcess(process, json.loads(line), log)
    finally:
        process.terminate()
        process.wait(_END_TIMEOUT_S)
        process.communicate()


@contextmanager
def health_server(
    *, tls: ServerTls | None = None, authenticator: Authenticator | None = None
) -> Iterator[str]:
    """Serve health for the block by the server's own gRPC, in this process. The block is given the address."""
    health = Health()
    takes_certificates = tls is not None and tls.requires_certificates
    server = GrpcServer(
        health.handlers,
        CallerReader(authenticator, takes_certificates=takes_certificates),
        max_message_bytes=1 << 20,
        arriving_bytes=1 << 30,
        connections_count=100,
        on_lost=lambda: None,
    )
    credentials = None if tls is None else server_credentials(tls)
    address = bind(server, "127.0.0.1:0", None, credentials)
    health.set_serving(True)
    server.start()
    try:
        yield address
    finally:
        server.stop_accepting()
        server.cancel_all()
        server.join()


def _serve(options: dict[str, Any]) -> None:
    """Serve until a signal comes."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter())
    logging.basicConfig(level="DEBUG", handlers=[handler])
    watched_files._CHECK_PERIOD_S = QUICK_S  # type: ignore[misc]  # a test's
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    paths = {name: Path(options[name]) for name in ("cert", "key") if name in options}
    client_ca = Path(options["client_ca"]) if "client_ca" in options else None
    tokens = TokenFile(Path(options["tokens"])) if "tokens" in options else None
    daemon = Daemon(
        Settings(
            options["addresses"],
            max_message_bytes=64 << 20,
            drain_timeout_s=1,
            takes_direct_calls=False,
            authenticator=Authenticator(tokens, takes_certificates=client_ca is not None),
            tls=ServerTls(**paths, client_ca=client_ca) if paths else None,
            health_port=options.get("health_port"),
            residents=ResidentLimits(lease_s=options.get("lease_s", 30.0)),
        )
    )
    daemon.serve(lambda: [CpuDevice(1)])
    sys.stdout.write(json.dumps(daemon.addresses + daemon.health_addresses) + "\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM})
    daemon.drain()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
