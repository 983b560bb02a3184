"""The daemon's life: it listens, becomes ready, serves, drains and stops.

LISTENING --devices ready--> SERVING --drain--> DRAINING --last call ended--> STOPPED
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Final

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deconvd.transport import TRANSPORT_OPTIONS
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.backend import Backend
from deconvd_server.descriptors import connections_count
from deconvd_server.device import Device
from deconvd_server.health import Health
from deconvd_server.listen import bind, release
from deconvd_server.rpc import Gate
from deconvd_server.serve import CallLog, Observer
from deconvd_server.settings import Settings

__all__ = ["Daemon", "State"]

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]
_HANDLER_THREADS_COUNT: Final = 1024
"""More than the calls and streams that run and wait, so that health is answered whatever the load:
those that run are one for each processor, or a few for each card. Threads are made as they are needed.
"""

_log = logging.getLogger(__name__)


class State(Enum):
    """Where a daemon is in its life."""

    LISTENING = "listening"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Daemon:
    """A gRPC server with its service, health and reflection.

    It listens once made: health then says NOT_SERVING and calls are answered UNAVAILABLE, until
    `serve` has devices.

    Attributes:
        addresses: Where it listens, with the ports that it got.
        backend: What serves calls; None until the devices are ready.

    Args:
        observers: Hear of every call.

    Raises:
        InvalidArgumentError, AddressInUseError: It cannot listen on one of the addresses.
    """

    def __init__(self, settings: Settings, observers: Sequence[Observer] = (CallLog(),)) -> None:
        self.state = State.LISTENING
        self.backend: Backend | None = None
        self._settings = settings
        self._observers = observers
        self._lock = threading.Lock()
        self._gate = Gate(_SERVICE, observers)
        self._health = Health(_SERVICE.full_name)
        self._handlers = ThreadPoolExecutor(_HANDLER_THREADS_COUNT, thread_name_prefix="handler")
        self._server = self._grpc_server()
        self.addresses = [
            bind(self._server, address, settings.access) for address in settings.addresses
        ]
        self._server.start()

    def serve(self, open_devices: Callable[[], Sequence[Device]]) -> None:
        """Open the devices and serve calls with them; return once it can.

        Raises:
            AddressInUseError: Another process has the port for direct calls.
        """
        devices = open_devices()
        try:
            backend = Backend(self._settings, devices, self.addresses, self._observers)
        except BaseException:
            for device in devices:
                device.close()
            raise
        with self._lock:
            if self.state is State.LISTENING:
                self.backend = backend
                self._gate.open(backend.behaviours)
                self.state = State.SERVING
                self._health.set_serving(True)
                return
        backend.withdraw()  # it drains already
        backend.end_direct_calls(0)
        backend.close()

    def drain(self) -> None:
        """Take no more calls, let those under way end, and stop: for good once it returns.

        Calls that outlast `drain_timeout_s` are cancelled.
        """
        with self._lock:
            self.state = State.DRAINING
            backend = self.backend
        self._health.enter_graceful_shutdown()
        if backend is not None:
            backend.withdraw()  # while its paths are ours, like the socket beside them
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        stopped = self._server.stop(self._settings.drain_timeout_s)
        # A watcher of health would keep the server from stopping for as long as it cares to watch.
        self._health.end_watches()
        stopped.wait()
        if backend is not None:
            backend.end_direct_calls(max(deadline_s - time.monotonic(), 0))
        self._handlers.shutdown()  # a cancelled call's handler may still be on its way out
        for address in self.addresses:
            release(address)
        if backend is not None:
            backend.close()
        self.state = State.STOPPED

    def fail(self) -> None:
        """Say NOT_SERVING for good: a device is lost, and only a new process can get it back."""
        self._health.enter_graceful_shutdown()

    def cut_drain(self) -> None:
        """Cancel the calls that `drain` waits for."""
        _log.warning("the drain is cut short: calls under way are cancelled")
        self._server.stop(None)
        if self.backend is not None:
            self.backend.cancel_direct_calls()

    def _grpc_server(self) -> grpc.Server:
        server = grpc.server(
            self._handlers,
            options=[
                ("grpc.max_receive_message_length", self._settings.max_message_bytes),
                ("grpc.max_send_message_length", self._settings.max_message_bytes),
                ("grpc.max_allowed_incoming_connections", connections_count()),
                *TRANSPORT_OPTIONS,
                # With it, a second server would share the port in silence.
                ("grpc.so_reuseport", 0),
            ],
        )
        server.add_generic_rpc_handlers((self._gate,))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (_SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        return server
