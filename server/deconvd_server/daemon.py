"""The life of the daemon: it listens, becomes ready, serves, drains and stops.

LISTENING --devices ready--> SERVING --drain--> DRAINING --last call ended--> STOPPED
    `-----------------drain----------------------^

Health says so a while before a drain, if balancers need time to notice.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Final

import deconvd
from deconvd.errors import DeconvdError
from deconvd.host.startup_line import describe_address
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.backend import Backend
from deconvd_server.call.counts import CallCounts
from deconvd_server.device import Device
from deconvd_server.resources.budgets import budgets
from deconvd_server.resources.descriptors import connections_count
from deconvd_server.resources.heartbeat import Heartbeat
from deconvd_server.resources.worker_threads import Workers
from deconvd_server.settings import Settings
from deconvd_server.transports.grpc.callers import CallerReader
from deconvd_server.transports.grpc.handlers import CALLS_COUNT, GrpcService
from deconvd_server.transports.grpc.health import Health
from deconvd_server.transports.grpc.health_server import HealthServer
from deconvd_server.transports.grpc.receive_limiter import ReceiveLimiter
from deconvd_server.transports.grpc.reflection import reflection_handlers
from deconvd_server.transports.grpc.server import GrpcServer
from deconvd_server.transports.grpc.tls import server_credentials
from deconvd_server.transports.listen import bind, listen_tcp, release, side_hosts
from deconvd_server.transports.observers import CallLog, Observer

if TYPE_CHECKING:
    from deconvd_server.metrics.collector import MetricsView
    from deconvd_server.metrics.server import MetricsServer

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

_ABORT_S: Final = 1.0
"""How long clients may take to receive that their calls were aborted."""

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
    UNAVAILABLE. If it shares its ports, clients wait until then instead: those that the kernel has given to it would
    find no other one by trying again at once.

    Attributes:
        addresses: The addresses on which it listens, with the ports that it got.
        backend: Serves the calls; None until the devices are open.

    Args:
        observers: They are told of every call, as is what counts calls.
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
        self._call_counts = CallCounts()
        self._observers = observers = (*observers, self._call_counts)
        self._on_lost = on_lost
        self._lock = threading.Lock()
        self._cut = threading.Event()
        self._workers = Workers(_WORKERS_COUNT, _PRESTARTED_WORKERS_COUNT)
        self._service = GrpcService(_SERVICE, self._workers, observers)
        self._health = Health(_SERVICE.full_name)
        tls = settings.tls
        arriving_bytes = budgets().messages_bytes
        callers = CallerReader(
            settings.authenticator,
            takes_certificates=tls is not None and tls.requires_certificates,
        )
        self._server = GrpcServer(
            {**self._service.handlers, **self._health.handlers, **reflection_handlers(_SERVICE)},
            callers,
            max_message_bytes=settings.max_message_bytes,
            arriving_bytes=arriving_bytes,
            connections_count=connections_count(),
            shares_ports=settings.shares_ports,
            on_lost=lambda: on_lost("gRPC's thread"),
        )
        self._receive_limiter = ReceiveLimiter(
            self._server.rpcs, arriving_bytes, self._server.call_later, self._server.drain_events
        )
        self.addresses = [
            bind(
                self._server,
                address,
                settings.access,
                None if tls is None else server_credentials(tls),
            )
            for address in settings.addresses
        ]
        self._health_server: HealthServer | None = None
        if settings.health_port is not None:
            self._health_server = HealthServer(
                self._health,
                self.addresses,
                settings.health_port,
                lambda: on_lost("the thread of the health port"),
            )
        self._callers = callers
        self._metrics_server = self._start_metrics_server()
        self._has_started = False
        self._heartbeat: Heartbeat | None = None
        if not settings.shares_ports:
            self._start()

    def _start(self) -> None:
        """Take calls from now on, if it does not already."""
        if not self._has_started:
            self._has_started = True
            self._server.call_later(0, self._receive_limiter.check)
            self._server.start()
            self._heartbeat = Heartbeat(self._server.call_later)

    @property
    def health_addresses(self) -> list[str]:
        """Where health alone is served."""
        return [] if self._health_server is None else self._health_server.addresses

    @property
    def metrics_addresses(self) -> list[str]:
        """Where metrics are served."""
        return [] if self._metrics_server is None else self._metrics_server.addresses

    def serve(self, open_devices: Callable[[], Sequence[Device]]) -> None:
        """Open the devices, and serve calls with them from now on.

        Raises:
            AddressInUseError: Another process has the port for direct calls.
        """
        devices = open_devices()
        try:
            backend = Backend(
                self._settings,
                devices,
                self.addresses,
                self._observers,
                self._call_counts,
                self._on_lost,
            )
        except BaseException:
            for device in devices:
                device.close()
            raise
        for device in devices:
            device.wait_until_warm()
        with self._lock:
            if self.state is DaemonState.LISTENING:
                self.backend = backend
                self._receive_limiter.set_accounting(backend.budgeted_bytes, backend.pooled_bytes)
                self._service.open(backend.methods)
                self.state = DaemonState.SERVING
                self._health.set_serving(True)
                self._start()
                return
        backend.withdraw()  # the daemon has begun to drain meanwhile
        backend.end_direct_calls(0)
        backend.close()

    def description(self, describe_callers: Callable[[str], str]) -> str:
        """Return a line about what serves where and for whom, for the log. To be called once it serves.

        Args:
            describe_callers: Says in words who may call by an address.
        """
        assert self.backend is not None
        addresses = [describe_address(where, describe_callers(where)) for where in self.addresses]
        addresses += [describe_address(where, "health alone") for where in self.health_addresses]
        addresses += [describe_address(where, "metrics") for where in self.metrics_addresses]
        return (
            f"deconvd {deconvd.__version__} serves on {', '.join(addresses)}"
            f"{self.backend.description()}; messages up to {self._settings.max_message_bytes} bytes"
        )

    def drain(self, delay_s: float = 0.0) -> bool:
        """Accept no more calls, wait for those under way, and stop for good.

        Calls that outlast `drain_timeout_s` are cancelled.

        Args:
            delay_s: For how long calls are still accepted, while health is NOT_SERVING already: balancers send them
                elsewhere once they have asked for it. `cut_drain` ends that time.

        Returns:
            Whether no call was cancelled.
        """
        self._health.fail()
        self._cut.wait(delay_s)
        with self._lock:
            self.state = DaemonState.DRAINING
            self._start()  # or it could not be stopped
            backend = self.backend
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        self._service.close()
        if backend is not None:
            backend.withdraw()  # now, while no other server can have taken over the sockets' paths
        is_clean = self._stop(deadline_s)
        if backend is not None:
            is_clean &= backend.end_direct_calls(max(deadline_s - time.monotonic(), 0))
        if self._health_server is not None:
            self._health_server.stop()  # last: probes learn that it drains, and not that it is gone
        if self._metrics_server is not None:
            self._metrics_server.stop()
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

    def hung_device(self, timeout_s: float) -> str | None:
        """Return a device for which a thread has waited longer than `timeout_s`; None if there is none."""
        return None if self.backend is None else self.backend.hung_device(timeout_s)

    def blocked_loop(self, timeout_s: float) -> str | None:
        """Return a thread that all calls need and that has hung for longer than `timeout_s`; None if there is none."""
        if self._heartbeat is not None and self._heartbeat.age_s > timeout_s:
            return "gRPC's thread"
        return None if self.backend is None else self.backend.blocked_loop(timeout_s)

    def abort(self, error: DeconvdError) -> bool:
        """End all calls with an error, and refuse later ones with it. Return False.

        It works while threads that serve calls hang in native code, whatever locks they hold. The process must end
        next. Files of its sockets stay, and the next server takes them over.
        """
        self._health.fail()
        self._service.abort(error)
        if self.backend is not None:
            self.backend.abort_direct_calls(error)
        self._service.wait_until_ended(_ABORT_S, lambda: False)
        self._health.end_watches()
        return False

    def cut_drain(self) -> None:
        """Cancel the calls that `drain` waits for."""
        _log.warning("the drain is cut short: calls under way are cancelled")
        self._cut.set()
        self._service.wake()
        if self.backend is not None:
            self.backend.cancel_direct_calls()

    def metrics_view(self) -> MetricsView:
        """Return the metrics, and who may see them."""
        # not above: it takes 20 ms, and most servers have no metrics
        from deconvd_server.metrics.collector import MetricsView

        return MetricsView(
            self._call_counts,
            lambda: self.backend,
            lambda: self._health.is_serving,
            lambda: self._callers.refused_count,
            self._settings.metrics_readers,
        )

    def _start_metrics_server(self) -> MetricsServer | None:
        settings = self._settings
        if settings.metrics_port is None:
            return None
        from deconvd_server.metrics.server import MetricsServer

        return MetricsServer(
            listen_tcp(
                [f"{host}:0" for host in side_hosts(self.addresses)],
                settings.metrics_port,
                "metrics (--metrics-port)",
            ),
            settings.authenticator,
            settings.tls,
            self.metrics_view().collector_for,
        )

    def _stop(self, deadline_s: float) -> bool:
        """Stop gRPC: wait for calls until the deadline, then cancel those under way. Return whether there was none."""
        time.sleep(min(_IN_FLIGHT_S, max(deadline_s - time.monotonic(), 0)))
        self._server.stop_accepting()
        self._service.refuse()
        self._health.end_watches()
        is_clean = self._service.wait_until_ended(
            max(deadline_s - time.monotonic(), 0), self._cut.is_set
        )
        self._server.cancel_all()
        self._server.join()
        return is_clean
