"""Standard gRPC health, whose watches can be ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2

__all__ = ["Health"]


class Health(health.HealthServicer):
    """The standard health service for a server and the services it names.

    Args:
        services: Names of the services; the server as a whole goes with them.
    """

    def __init__(self, *services: str) -> None:
        super().__init__()
        self._services = ("", *services)
        self._watches: set[grpc.ServicerContext] = set()
        self.set_serving(False)

    def set_serving(self, serving: bool) -> None:
        """Say SERVING or NOT_SERVING of all."""
        status = health_pb2.HealthCheckResponse
        for service in self._services:
            self.set(service, status.SERVING if serving else status.NOT_SERVING)

    def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.ServicerContext,
        send_response_callback: Callable[..., Any] | None = None,
    ) -> Any:
        """Stream a service's health to a watcher."""
        self._watches.add(context)
        context.add_callback(lambda: self._watches.discard(context))
        return super().Watch(request, context, send_response_callback)

    def end_watches(self) -> None:
        """End every watch."""
        for context in list(self._watches):
            context.cancel()
