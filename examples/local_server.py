"""A deconvd-server process that listens where one likes and runs for as long as a block of code."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from deconvd_client.local_server import run_server

__all__ = ["local_server"]


@contextmanager
def local_server(device: str, *options: str, address: str | None = None) -> Iterator[str]:
    """Run a server for the duration of the block. Yield the target to connect to, when the server is ready.

    Args:
        device: The server's ``--device``: ``cpu``, ``cuda``, ``cuda:N`` or ``auto``.
        options: Further options of the server, each followed by its value.
        address: The address to listen on. None: a new Unix socket.

    Raises:
        InvalidArgumentError, UnavailableError: The server did not start.
    """
    names = [word.removeprefix("--").replace("-", "_") for word in options[::2]]
    with tempfile.TemporaryDirectory(prefix="deconvd-") as folder:
        address = address or f"unix:{folder}/deconvd.sock"
        with run_server(device, address, dict(zip(names, options[1::2], strict=True))) as target:
            yield target
