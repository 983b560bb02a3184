"""Health alone, in plain text and without credentials, on a port of its own: for probes that know neither."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from deconvd_server.transports.grpc.callers import CallerReader
from deconvd_server.transports.grpc.health import Health
from deconvd_server.transports.grpc.server import GrpcServer
from deconvd_server.transports.listen import bind, side_hosts

__all__ = ["HealthServer"]

_MAX_MESSAGE_BYTES: Final = 4096
"""More than the name of any service takes."""

_ARRIVING_BYTES: Final = 1 << 20
"""So little that each connection has the smallest window, of 64 KiB."""

_CONNECTIONS_COUNT: Final = 64
"""Orchestrators have one or two, and 64 take 4 MiB at most. gRPC refuses further ones."""

_STREAMS_COUNT: Final = 8
"""How many calls one connection may have under way: a check, and a watch for each of some services."""

_CONNECTION_AGE_S: Final = 60.0
"""How long a connection may last, so that none keeps its place for ever. Clients that watch connect anew."""


class HealthServer:
    """Serves health alone. It needs no limiter of messages: what may arrive is bounded by its connections.

    Attributes:
        addresses: Where it listens.

    Args:
        health: What it tells.
        addresses: The addresses of the main server. See `side_hosts`.
        port: The port; 0 for any free port.
        on_lost: Called if its thread ends without being stopped.

    Raises:
        AddressInUseError: Another process has the port.
    """

    def __init__(
        self, health: Health, addresses: Iterable[str], port: int, on_lost: Callable[[], None]
    ) -> None:
        self._server = GrpcServer(
            health.handlers,
            CallerReader(),
            max_message_bytes=_MAX_MESSAGE_BYTES,
            arriving_bytes=_ARRIVING_BYTES,
            connections_count=_CONNECTIONS_COUNT,
            streams_count=_STREAMS_COUNT,
            connection_age_s=_CONNECTION_AGE_S,
            on_lost=on_lost,
        )
        self.addresses: list[str] = []
        for host in side_hosts(addresses):
            try:
                self.addresses.append(bind(self._server, f"{host}:{port}"))
            except OSError as error:
                error.strerror = f"health alone (--health-port): {error.strerror}"
                raise
            port = int(self.addresses[-1].rpartition(":")[2])  # the others must have the same
        self._server.start()

    def stop(self) -> None:
        """Take no more calls, cancel those under way, and stop."""
        self._server.stop_accepting()
        self._server.cancel_all()
        self._server.join()
