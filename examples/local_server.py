"""A deconvd-server process of one's own, on a Unix socket, for as long as a block of code runs."""

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
"""Longer than a GPU takes to wake."""

_STOP_TIMEOUT_S: Final = 10.0


@contextmanager
def local_server(device: str, *options: str, address: str | None = None) -> Iterator[str]:
    """Run a server for the block, and yield the target to connect to, once it serves.

    Args:
        device: As the server's ``--device``: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        options: More of the server's options.
        address: Where it listens; None for a Unix socket of its own.

    Raises:
        UnavailableError: It did not start. Standard error has its own message.
    """
    with tempfile.TemporaryDirectory(prefix="deconvd-") as folder:
        address = address or f"unix:{folder}/deconvd.sock"
        command = [sys.executable, "-m", "deconvd_server", "--device", device, "--listen", address]
        quiet = ["--log-level", "warning", *options]
        with subprocess.Popen(command + quiet, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield _target_once_it_listens(process)
            finally:
                _stop(process)


def _target_once_it_listens(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    timer = threading.Timer(_START_TIMEOUT_S, process.kill)
    timer.start()
    line = process.stdout.readline()  # empty if the process ends first
    timer.cancel()
    if "listening" not in line:
        raise UnavailableError("deconvd-server did not start; its own message stands above")
    return line.split(" on ")[1].strip()


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
