"""The daemon's life: it listens, becomes ready, serves, drains and stops.

LISTENING --devices ready--> SERVING --drain--> DRAINING --last call ended--> STOPPED
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
"""One for each call, and some for the messages of sessions."""

_PRESTARTED_WORKERS_COUNT: Final = 16
"""Those that are there from the start, so that calls are served when the system has no thread left."""

_IN_FLIGHT_S: Final = 0.1
"""How long calls that clients have sent may take to come. What comes once gRPC stops it ends with CANCELLED,
which clients need not try again. So calls are kept waiting for so long: who calls again only with an answer has none
on its way then, and once told UNAVAILABLE it knows to go elsewhere.
"""

_log = logging.getLogger(__name__)


class DaemonState(Enum):
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
        on_lost: Called, in any thread, with what has ended by itself and everyone depends on: the process must be
            started anew.

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
        self._gate = GrpcService(_SERVICE, self._workers, observers)
        self._health = Health(_SERVICE.full_name)
        self._server = GrpcServer(
            {**self._gate.handlers, **self._health.handlers, **reflection_handlers(_SERVICE)},
            settings.max_message_bytes,
            budgets().messages_bytes,
            lambda: on_lost("gRPC's thread"),
        )
        self.addresses = [
            bind(self._server, address, settings.access) for address in settings.addresses
        ]
        self._server.start()
        self._gate.expire(self._server.call_later)

    def serve(self, open_devices: Callable[[], Sequence[Device]]) -> None:
        """Open the devices and serve calls with them; return once it can.

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
                self._gate.open(backend.methods)
                self.state = DaemonState.SERVING
                self._health.set_serving(True)
                return
        backend.withdraw()  # it drains already
        backend.end_direct_calls(0)
        backend.close()

    def drain(self) -> bool:
        """Take no more calls, let those under way end, and stop: for good once it returns.

        Calls that outlast `drain_timeout_s` are cancelled.

        Returns:
            Whether no call was.
        """
        with self._lock:
            self.state = DaemonState.DRAINING
            backend = self.backend
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        self._health.fail()
        self._gate.close()
        if backend is not None:
            backend.withdraw()  # while its paths are ours, like the socket beside them
        is_whole = self._stop(deadline_s)
        if backend is not None:
            is_whole &= backend.end_direct_calls(max(deadline_s - time.monotonic(), 0))
        for address in self.addresses:
            release(address)
        self._workers.close()  # a cancelled call's may still be on its way out
        if backend is not None:
            backend.close()
        self.state = DaemonState.STOPPED
        return is_whole

    def fail(self) -> None:
        """Say NOT_SERVING for good: a device is lost, and only a new process can get it back."""
        self._health.fail()

    def cut_drain(self) -> None:
        """Cancel the calls that `drain` waits for."""
        _log.warning("the drain is cut short: calls under way are cancelled")
        self._is_cut = True
        self._gate.wake()
        if self.backend is not None:
            self.backend.cancel_direct_calls()

    def _stop(self, deadline_s: float) -> bool:
        """Stop gRPC once no call is under way, or they are to be cancelled; return whether none was."""
        time.sleep(min(_IN_FLIGHT_S, max(deadline_s - time.monotonic(), 0)))
        self._server.stop_accepting()
        self._gate.refuse()
        self._health.end_watches()
        is_whole = self._gate.wait_until_ended(
            max(deadline_s - time.monotonic(), 0), lambda: self._is_cut
        )
        self._server.cancel_all()
        self._server.join()
        return is_whole
