"""A server in this process that holds its calls, so that they can be cancelled while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deconvd_client import Connection
from deconvd_server.daemon import Daemon
from deconvd_server.settings import Settings
from deconvd_server.shared_memory import Lender
from tests.devices import HoldingDevice

__all__ = ["HeldServer", "held_server", "load"]

MIB = 1 << 20


@dataclass
class HeldServer:
    """A server whose device holds each call until it is cancelled, or until `release`.

    Attributes:
        unix_target, tcp_target: Its addresses.
        lender: Lends its shared memory.
    """

    unix_target: str
    tcp_target: str
    lender: Lender
    _device: HoldingDevice

    def hold(self) -> None:
        """Hold all calls that begin from now on."""
        self._device.let_go.clear()

    def release(self) -> None:
        """Compute calls as every server does, also those that are held."""
        self._device.let_go.set()

    def target(self, transport: str) -> str:
        """Return the address for a transport."""
        return self.unix_target if transport in ("unix", "shared_memory") else self.tcp_target


def load(F: Connection) -> tuple[int, int, int]:
    """Return how many calls run and wait on a server, and how much of its memory they use."""
    (device,) = F.server_info().devices
    return device.running_calls_count, device.waiting_calls_count, device.used_bytes


@contextmanager
def held_server(directory: Path) -> Iterator[HeldServer]:
    """Serve on a Unix socket and a port. Calls are not held at first."""
    device = HoldingDevice()
    device.let_go.set()
    addresses = [f"unix:{directory}/held.sock", "127.0.0.1:0"]
    daemon = Daemon(Settings(addresses, 64 * MIB, 10, shared_memory_bytes=1024 * MIB))
    daemon.serve(lambda: [device])
    assert daemon.backend is not None
    assert daemon.backend.lender is not None
    try:
        yield HeldServer(addresses[0], daemon.addresses[1], daemon.backend.lender, device)
    finally:
        device.let_go.set()
        daemon.drain()
