"""The life of the daemon: it listens, becomes ready, serves, drains and stops.

LISTENING --devices ready--> SERVING --drain--> DRAINING --last call ended--> STOPPED
    `-----------------drain----------------------^
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final

from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.backend import Backend
from deconvd_server.device import Device
from deconvd_server.resources.budgets import budgets
from deconvd_server.resources.worker_threads import Workers
from deconvd_server.settings import Settings
from deconvd_server.transports.grpc.handlers import CALLS_COUNT, GrpcService
from deconvd_server.transports.grpc.health import Health
from deconvd_server.transports.grpc.reflection import reflection_handlers
from deconvd_server.transports.grpc.server import GrpcServer
from deconvd_server.transports.listen import bind, release
from deconvd_server.transports.observers import CallLog, Observer

__all__ = ["Daemon", "DaemonState"]

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]

_WORKERS_COUNT: Final = CALLS_COUNT + 16
"""A worker for each call, and some for the messages of sessions."""

_PRESTARTED_WORKERS_COUNT: Final = 16
"""The workers that are started at once, so that calls are served even if the system has no thread left later."""

_IN_FLIGHT_S: Final = 0.1
"""How long a call that a client has sent may take to arrive. Once the server has stopped accepting, gRPC ends arriving
calls with CANCELLED, which clients need not retry. So a drain first lets new calls wait for this time, unanswered: a
client that sends one call after the other has none on its way then. Only then all get UNAVAILABLE, and go elsewhere.
"""

_log = logging.getLogger(__name__)


class DaemonState(Enum):
    """Where a daemon is in its life."""

    LISTENING = "listening"
    SERVING = "serving"
    DRAINING = "draining"
    STOPPED = "stopped"


class Daemon:
    """A server: gRPC with health and reflection, and the backend.

    It listens as soon as it is made. Until `serve` has opened the devices, health is NOT_SERVING and calls get
    UNAVAILABLE.

    Attributes:
        addresses: The addresses on which it listens, with the ports that it got.
        backend: Serves the calls; None until the devices are open.

    Args:
        observers: They are told of every call.
        on_lost: Called with the name of a part that has ended by itself and that all calls need, in any thread: the
            process must be restarted.

    Raises:
        InvalidArgumentError, AddressInUseError: It cannot listen on one of the addresses.
    """

    def __init__(
        self,
        settings: Settings,
        observers: Sequence[Observer] = (CallLog(),),
        on_lost: Callable[[str], None] = lambda _what: None,
    ) -> None:
        self.state = DaemonState.LISTENING
        self.backend: Backend | None = None
        self._settings = settings
        self._observers = observers
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._is_cut = False
        self._workers = Workers(_WORKERS_COUNT, _PRESTARTED_WORKERS_COUNT)
        self._service = GrpcService(_SERVICE, self._workers, observers)
        self._health = Health(_SERVICE.full_name)
        self._server = GrpcServer(
            {**self._service.handlers, **self._health.handlers, **reflection_handlers(_SERVICE)},
            settings.max_message_bytes,
            budgets().messages_bytes,
            lambda: on_lost("gRPC's thread"),
        )
        self.addresses = [
            bind(self._server, address, settings.access) for address in settings.addresses
        ]
        self._server.start()
        self._service.expire(self._server.call_later)

    def serve(self, open_devices: Callable[[], Sequence[Device]]) -> None:
        """Open the devices, and serve calls with them from now on.

        Raises:
            AddressInUseError: Another process has the port for direct calls.
        """
        devices = open_devices()
        try:
            backend = Backend(
                self._settings, devices, self.addresses, self._observers, self._on_lost
            )
        except BaseException:
            for device in devices:
                device.close()
            raise
        with self._lock:
            if self.state is DaemonState.LISTENING:
                self.backend = backend
                self._server.receive_limiter.set_accounting(
                    backend.budgeted_bytes, backend.pooled_bytes
                )
                self._service.open(backend.methods)
                self.state = DaemonState.SERVING
                self._health.set_serving(True)
                return
        backend.withdraw()  # the daemon has begun to drain meanwhile
        backend.end_direct_calls(0)
        backend.close()

    def drain(self) -> bool:
        """Accept no more calls, wait for those under way, and stop for good.

        Calls that outlast `drain_timeout_s` are cancelled.

        Returns:
            Whether no call was cancelled.
        """
        with self._lock:
            self.state = DaemonState.DRAINING
            backend = self.backend
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        self._health.fail()
        self._service.close()
        if backend is not None:
            backend.withdraw()  # now, while no other server can have taken over the sockets' paths
        is_clean = self._stop(deadline_s)
        if backend is not None:
            is_clean &= backend.end_direct_calls(max(deadline_s - time.monotonic(), 0))
        for address in self.addresses:
            release(address)
        self._workers.close()  # waits for workers of cancelled calls, which use the backend
        if backend is not None:
            backend.close()
        self.state = DaemonState.STOPPED
        return is_clean

    def fail(self) -> None:
        """Report NOT_SERVING for good: a device is lost, and only a new process can get it back."""
        self._health.fail()

    def cut_drain(self) -> None:
        """Cancel the calls that `drain` waits for."""
        _log.warning("the drain is cut short: calls under way are cancelled")
        self._is_cut = True
        self._service.wake()
        if self.backend is not None:
            self.backend.cancel_direct_calls()

    def _stop(self, deadline_s: float) -> bool:
        """Stop gRPC: wait for calls until the deadline, then cancel those under way. Return whether there was none."""
        time.sleep(min(_IN_FLIGHT_S, max(deadline_s - time.monotonic(), 0)))
        self._server.stop_accepting()
        self._service.refuse()
        self._health.end_watches()
        is_clean = self._service.wait_until_ended(
            max(deadline_s - time.monotonic(), 0), lambda: self._is_cut
        )
        self._server.cancel_all()
        self._server.join()
        return is_clean
