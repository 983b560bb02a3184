"""A deconvd-server process on a Unix socket that runs for as long as a block of code."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from deconvd_client import UnavailableError

__all__ = ["local_server"]

_START_TIMEOUT_S: Final = 120.0
"""Longer than the first use of a GPU takes."""

_STOP_TIMEOUT_S: Final = 10.0


@contextmanager
def local_server(device: str, *options: str, address: str | None = None) -> Iterator[str]:
    """Run a server for the duration of the block. Yield the target to connect to, when the server is ready.

    Args:
        device: The server's ``--device``: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        options: Further options of the server.
        address: The address to listen on. None: a new Unix socket.

    Raises:
        UnavailableError: The server did not start. Its message is on standard error.
    """
    with tempfile.TemporaryDirectory(prefix="deconvd-") as folder:
        address = address or f"unix:{folder}/deconvd.sock"
        command = [sys.executable, "-m", "deconvd_server", "--device", device, "--listen", address]
        quiet = ["--log-level", "warning", *options]
        with subprocess.Popen(command + quiet, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield _wait_for_target(process)
            finally:
                _stop(process)


def _wait_for_target(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    timer = threading.Timer(_START_TIMEOUT_S, process.kill)
    timer.start()
    line = process.stdout.readline()  # empty if the process ends first
    timer.cancel()
    if "listening" not in line:
        raise UnavailableError("deconvd-server did not start: see its message above")
    return line.split(" on ")[1].strip()


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
