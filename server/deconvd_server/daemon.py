"""The daemon's life: it listens, becomes ready, serves, drains and stops.

LISTENING --devices ready--> SERVING --drain--> DRAINING --last call ended--> STOPPED
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from deconvd.transport import TRANSPORT_OPTIONS
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.admission import Admission
from deconvd_server.device import Device
from deconvd_server.direct import DirectServer
from deconvd_server.engine import Engines
from deconvd_server.health import Health
from deconvd_server.listen import bind, listen_beside, release, unix_sockets
from deconvd_server.residents import ResidentLimits, Residents
from deconvd_server.rpc import handler
from deconvd_server.serve import CallLog, Observer
from deconvd_server.service import SERVICE_NAME, DeconvolutionService
from deconvd_server.shared_memory import Cards, Lender, Limits
from deconvd_server.side_socket import Purpose, SideSocket, open_alone, open_beside
from deconvd_server.streaming import SLICES_IN_FLIGHT
from deconvd_server.unix_socket import Access, AddressInUseError

__all__ = ["Daemon", "Settings", "State"]

_WAITING_CALLS_COUNT = 96
_STREAMS_COUNT = 16
_WAITING_STREAMS_COUNT = 16
_HANDLER_THREADS_COUNT = 1024
"""More than the calls and streams that run and wait, so that health is answered whatever the load:
those that run are one for each processor, or a few for each card. Threads are made as they are needed.
"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a daemon is told when it starts.

    Attributes:
        addresses: Where to listen; see `bind`.
        max_message_bytes: The largest request and the largest response.
        drain_timeout_s: How long calls under way may take to end once the daemon drains.
        shared_memory_bytes: How much memory to lend to clients on this host; 0 for none.
        shared_memory_users: Ids of the users to lend it to, beside the server's own and root.
        access: Who may open the Unix sockets; None for whom the process's umask lets.
        residents: How much may stay between calls, and for how long.
        takes_direct_calls: Whether calls are taken without gRPC, too.
        direct_port: The TCP port for them, on the hosts of `addresses`; 0 for any free one.
    """

    addresses: Sequence[str]
    max_message_bytes: int
    drain_timeout_s: float
    shared_memory_bytes: int = 0
    shared_memory_users: Collection[int] = ()
    residents: ResidentLimits = field(default_factory=ResidentLimits)
    takes_direct_calls: bool = True
    direct_port: int = 0
    access: Access | None = None


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

    Args:
        observers: Hear of every call.

    Raises:
        InvalidArgumentError, AddressInUseError: It cannot listen on one of the addresses.
    """

    def __init__(self, settings: Settings, observers: Sequence[Observer] = (CallLog(),)) -> None:
        self.state = State.LISTENING
        self._settings = settings
        self._observers = observers
        self._lock = threading.Lock()
        self._slices = ThreadPoolExecutor(
            _STREAMS_COUNT * SLICES_IN_FLIGHT, thread_name_prefix="slice"
        )
        self._service = DeconvolutionService(
            settings.max_message_bytes,
            streams=Admission(
                _STREAMS_COUNT,
                _stream_budget_bytes(),
                _WAITING_STREAMS_COUNT,
                memory="the host's memory for streams",
            ),
            executor=self._slices,
        )
        self._direct: DirectServer | None = None
        self._health = Health(SERVICE_NAME)
        self._handlers = ThreadPoolExecutor(_HANDLER_THREADS_COUNT, thread_name_prefix="handler")
        self._server = self._grpc_server()
        self.addresses = [
            bind(self._server, address, settings.access) for address in settings.addresses
        ]
        self._service.unix_sockets = unix_sockets(self.addresses)
        self._server.start()

    def serve(self, open_devices: Callable[[], Sequence[Device]]) -> None:
        """Open the devices and serve calls with them; return once it can.

        Raises:
            AddressInUseError: Another process has the port for direct calls.
        """
        devices = open_devices()
        engines = Engines(devices, waiting_count=_WAITING_CALLS_COUNT // len(devices))
        grpc_paths = [Path(path) for path in self._service.unix_sockets]
        memory_sides = self._open_for_memory(grpc_paths)
        self._service.lender = self._lend(engines, list(memory_sides.values()))
        listeners = self._listen_for_direct_calls()
        call_sides = self._open_for_calls(grpc_paths)
        self._direct = self._serve_directly(list(call_sides.values()), listeners)
        self._service.side_sockets = [
            pb.SideSockets(
                calls=_name_for_clients(path, call_sides),
                memory=_name_for_clients(path, memory_sides),
            )
            for path in grpc_paths
        ]
        self._service.memory_socket = next((str(s.path) for s in memory_sides.values()), "")
        residents = Residents(engines, self._settings.residents)
        with self._lock:
            self._service.residents = residents
            if self.state is State.LISTENING:
                self.state = State.SERVING
                self._health.set_serving(True)

    def drain(self) -> None:
        """Take no more calls, let those under way end, and stop: for good once it returns.

        Calls that outlast `drain_timeout_s` are cancelled.
        """
        with self._lock:
            self.state = State.DRAINING
        self._health.enter_graceful_shutdown()
        # while their paths are ours, like the socket beside them
        if self._service.lender is not None:
            self._service.lender.withdraw()
        if self._direct is not None:
            self._direct.withdraw()
        if self._service.residents is not None:
            self._service.residents.drain()
        deadline_s = time.monotonic() + self._settings.drain_timeout_s
        stopped = self._server.stop(self._settings.drain_timeout_s)
        # A watcher of health would keep the server from stopping for as long as it cares to watch.
        self._health.end_watches()
        stopped.wait()
        if self._direct is not None:
            self._direct.close(max(deadline_s - time.monotonic(), 0))
        self._handlers.shutdown()  # a cancelled call's handler may still be on its way out
        self._slices.shutdown()
        for address in self.addresses:
            release(address)
        if self._service.lender is not None:
            self._service.lender.close()
        if self._service.residents is not None:
            self._service.residents.close()
            self._service.residents.engines.close()
        self.state = State.STOPPED

    def fail(self) -> None:
        """Say NOT_SERVING for good: a device is lost, and only a new process can get it back."""
        self._health.enter_graceful_shutdown()

    def cut_drain(self) -> None:
        """Cancel the calls that `drain` waits for."""
        _log.warning("the drain is cut short: calls under way are cancelled")
        self._server.stop(None)
        if self._direct is not None:
            self._direct.cancel()

    def _open_for_memory(self, grpc_paths: Sequence[Path]) -> dict[Path, SideSocket]:
        """Return the sockets where memory is lent, by those for gRPC: a server without any has one, too."""
        if not self._settings.shared_memory_bytes:
            return {}
        if grpc_paths:
            return open_beside(grpc_paths, Purpose.MEMORY, self._settings.access)
        try:
            alone = open_alone(Purpose.MEMORY, self._settings.access)
        except OSError as error:
            _log.warning("no memory is lent to clients on this host: %s", error)
            return {}
        return {alone.path: alone}

    def _open_for_calls(self, grpc_paths: Sequence[Path]) -> dict[Path, SideSocket]:
        if not self._settings.takes_direct_calls:
            return {}
        return open_beside(grpc_paths, Purpose.CALLS, self._settings.access)

    def _lend(self, engines: Engines, sides: Sequence[SideSocket]) -> Lender | None:
        limit_bytes = self._settings.shared_memory_bytes
        if not sides:
            return None
        return Lender(
            sides,
            Limits(limit_bytes, limit_bytes // 2),
            on_map=engines.register,
            users={0, os.geteuid(), *self._settings.shared_memory_users},
            cards=_cards(engines),
            instance=bytes.fromhex(self._service.instance_id),
        )

    def _serve_directly(
        self, sides: Sequence[SideSocket], listeners: Sequence[socket.socket]
    ) -> DirectServer | None:
        if not self._settings.takes_direct_calls:
            return None
        if listeners:
            self._service.direct_port = listeners[0].getsockname()[1]
        return DirectServer(
            sides,
            listeners,
            self._service.behaviours(),
            bytes.fromhex(self._service.instance_id),
            self._observers,
        )

    def _listen_for_direct_calls(self) -> list[socket.socket]:
        port = self._settings.direct_port
        if not self._settings.takes_direct_calls:
            return []
        try:
            return listen_beside(self.addresses, port)
        except AddressInUseError as error:
            if port:
                raise
            _log.warning("calls over TCP are made by gRPC: %s", error)
            return []

    def _grpc_server(self) -> grpc.Server:
        server = grpc.server(
            self._handlers,
            options=[
                ("grpc.max_receive_message_length", self._settings.max_message_bytes),
                ("grpc.max_send_message_length", self._settings.max_message_bytes),
                *TRANSPORT_OPTIONS,
                # With it, a second server would share the port in silence.
                ("grpc.so_reuseport", 0),
            ],
        )
        server.add_generic_rpc_handlers(
            (handler(SERVICE_NAME, self._service.behaviours(), self._observers),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        return server


def _name_for_clients(grpc_path: Path, sides: Mapping[Path, SideSocket]) -> str:
    """Return what clients are told of the socket beside one for gRPC: its name if it is in the same directory."""
    side = sides.get(grpc_path)
    if side is None:
        return ""
    return side.path.name if side.path.parent == grpc_path.parent else str(side.path)


def _cards(engines: Engines) -> Cards | None:
    """Return who lends memory of cards, up to half of what there is; None if there is no card."""
    by_card = {engine.info.card: engine for engine in engines.all if engine.info.card}
    budget_bytes = sum(engine.info.budget_bytes for engine in by_card.values())
    return Cards(by_card, Limits(budget_bytes // 2, budget_bytes // 4)) if by_card else None


def _stream_budget_bytes() -> int:
    """Return what streams may hold of the host's memory: half of it."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
