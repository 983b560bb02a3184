"""The part of the server that exists once its devices are open: engines, residents, lent memory, direct connections."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from deconvd.errors import DeconvdError
from deconvd.host.machine import memory_bytes, used_bytes
from deconvd.lending.protocol import FIRST_REGION_BYTES
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.server_counts import MemoryUse, ServerCounts
from deconvd_server.call.counts import CallCounts
from deconvd_server.device import Device
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.engine import Engine, Engines
from deconvd_server.engine.queue_limits import WaitLimit
from deconvd_server.engine.result_arrays import idle_result_bytes
from deconvd_server.residents import Residents
from deconvd_server.resources.budgets import budgets
from deconvd_server.resources.socket_file import AddressInUseError
from deconvd_server.resources.unix_listener import (
    SideSocket,
    SocketPurpose,
    open_private_socket,
    open_side_sockets,
)
from deconvd_server.resources.worker_table import ConnectionLoad
from deconvd_server.resources.worker_threads import Workers, WorkersExecutor
from deconvd_server.service.deconvolution import DeconvolutionService
from deconvd_server.service.method import RpcMethod, idle_operand_bytes
from deconvd_server.service.parsed_request import SLICES_IN_FLIGHT
from deconvd_server.service.stream_admission import StreamAdmission
from deconvd_server.settings import Settings
from deconvd_server.shared_memory import CardLender, Lender, LoanLimits
from deconvd_server.transports.direct.server import DirectServer
from deconvd_server.transports.listen import listen_tcp, unix_socket_paths
from deconvd_server.transports.observers import Observer

__all__ = ["STREAMS_COUNT", "Backend"]

_WAITING_CALLS_COUNT: Final = 144
"""How many calls may wait for a device, on all devices together. Each takes a thread while it waits.

Half of them may be of one peer: enough for 64 threads of a client. If they are small they wait for seconds at most.
"""

_WAITING_STREAMS_COUNT: Final = 16
"""How many streams may wait: as many as run, so that a stream waits for one other on average."""

_SPARE_PART: Final = 16
"""Memory is kept ready for a client if it is at most one part in this many of all that may be lent."""

_POOLS_COUNT: Final = 4
"""How many pools there are of those that `Budgets.pool_bytes` is for."""

STREAMS_COUNT: Final = 16
"""How many streams may run at once: those of one peer, an eighth less."""

_log = logging.getLogger(__name__)


class Backend:
    """Everything that serves calls. It is complete once it is made.

    Attributes:
        methods: The methods of the service by their names.
        residents: The engines, and the residents on their devices.
        lender: Lends memory to clients on this host; None if the server lends none.
        stream_admission: Admits streams.

    Args:
        devices: At least one. `close` closes them; if this cannot be made, the caller does.
        addresses: The addresses of the settings, as `bind` has returned them.
        observers: They are told of every direct call.
        call_counts: Counts the calls of all transports. It is one of the observers.
        on_lost: Called with the name of what is lost, in any thread, if an unforeseen error ends a thread that all
            calls need. Only a new process helps then.

    Raises:
        AddressInUseError: Another process has the port for direct calls.
    """

    def __init__(
        self,
        settings: Settings,
        devices: Sequence[Device],
        addresses: Sequence[str],
        observers: Sequence[Observer],
        call_counts: CallCounts,
        on_lost: Callable[[str], None] = lambda _what: None,
    ) -> None:
        instance = secrets.token_bytes(16)
        listeners = _listen_for_direct_calls(settings, addresses)  # first, because it may fail
        self._direct_port = listeners[0].getsockname()[1] if listeners else None
        grpc_paths = [Path(path) for path in unix_socket_paths(addresses)]
        memory_sides = _open_memory_sockets(settings, grpc_paths)
        call_sides = _open_call_sockets(settings, grpc_paths)
        self._endpoints = pb.GetServerInfoResponse(
            instance_id=instance.hex(),
            unix_sockets=[str(path) for path in grpc_paths],
            side_sockets=[
                pb.SideSockets(
                    calls=_side_socket_name(path, call_sides),
                    memory=_side_socket_name(path, memory_sides),
                )
                for path in grpc_paths
            ],
            shared_memory_socket=next((str(side.path) for side in memory_sides.values()), ""),
            direct_port=self._direct_port or 0,
        )
        self._call_counts = call_counts
        self._machine_bytes = memory_bytes()
        self._messages_limit_bytes = 2 * budgets().messages_bytes
        self._messages = (
            Admission(  # not for calls on the processor: its own budget counts their messages
                _WAITING_CALLS_COUNT + sum(device.info.calls_count for device in devices),
                self._messages_limit_bytes,
                _WAITING_CALLS_COUNT,
                memory="the host's memory for messages",
            )
        )
        self._engines = Engines(
            devices,
            waiting_count=_WAITING_CALLS_COUNT // len(devices),
            wait_limit=WaitLimit(settings.queue_wait_s),
            messages=self._messages,
        )
        self._resident_limits = settings.residents
        self.residents = Residents(self._engines, settings.residents)
        self.lender = _make_lender(
            settings, self._engines, list(memory_sides.values()), instance, on_lost
        )
        self._streams_memory = Admission(
            STREAMS_COUNT,
            budgets().streams_bytes,
            _WAITING_STREAMS_COUNT,
            memory="the host's memory for streams",
        )
        self.stream_admission = StreamAdmission(
            self._streams_memory, STREAMS_COUNT, _WAITING_STREAMS_COUNT, on_lost
        )
        self._slices = WorkersExecutor(
            Workers(STREAMS_COUNT * SLICES_IN_FLIGHT, SLICES_IN_FLIGHT, name="slice")
        )
        service = DeconvolutionService(
            self.residents,
            self.lender,
            self._endpoints,
            self.counts,
            lambda: self.active_connections_count,
            max_message_bytes=settings.max_message_bytes,
            streams=self.stream_admission,
            executor=self._slices,
        )
        self.methods: Mapping[str, RpcMethod] = service.methods()
        self._direct: DirectServer | None = None
        if settings.takes_direct_calls:
            self._direct = DirectServer(
                list(call_sides.values()),
                listeners,
                self.methods,
                instance,
                settings.authenticator,
                settings.tls,
                observers,
                on_lost,
            )

    def worker(self) -> pb.Worker:
        """Return what other processes that serve as one with this tell their clients of it."""
        return pb.Worker(
            unix_sockets=self._endpoints.unix_sockets,
            devices=[engine.info.id for engine in self.engines],
            instance_id=self._endpoints.instance_id,
            active_connections_count=self.active_connections_count,
        )

    def connection_load(self) -> ConnectionLoad:
        """Return what its direct connections are, for the homes of clients that begin."""
        return ConnectionLoad(0, 0) if self._direct is None else self._direct.load()

    @property
    def active_connections_count(self) -> int:
        """How many direct connections have a call under way, or had one a moment ago."""
        return 0 if self._direct is None else self._direct.active_connections_count

    def counts(self, identity: str) -> ServerCounts:
        """Return what the server has done for an identity, or for all if it is empty, and what it has in use now."""
        streams = self.stream_admission.load
        memory = [
            MemoryUse("messages", self._messages.taken_bytes, self._messages_limit_bytes),
            MemoryUse("streams", streams.used_bytes, budgets().streams_bytes),
            MemoryUse(
                "pools", idle_operand_bytes() + idle_result_bytes(), 2 * budgets().pool_bytes
            ),
            MemoryUse("process", used_bytes(), self._machine_bytes),
        ]
        if self.lender is not None:
            memory.append(
                MemoryUse("shared memory", self.lender.lent_bytes, self.lender.limit_bytes)
            )
        return ServerCounts(
            uptime_us=self._call_counts.uptime_us,
            methods=tuple(self._call_counts.methods(identity)),
            stages=tuple(self._call_counts.stages(identity)),
            memory=tuple(memory),
            sessions_count=self.residents.sessions.count,
            direct_connections_count=0 if self._direct is None else self._direct.connections_count,
            borrowers_count=0 if self.lender is None else self.lender.borrowers_count,
            running_streams_count=streams.running_count,
            waiting_streams_count=streams.waiting_count,
        )

    def description(self) -> str:
        """Return the port for direct calls, the devices and the budgets, as the end of a line for the log."""
        port = "" if self._direct_port is None else f", direct calls on port {self._direct_port}"
        limits = self._resident_limits
        devices = ", ".join(
            f"{engine.info.id} ({engine.info.name}, {engine.info.budget_bytes} bytes, of them "
            f"{limits.bytes_on(engine)} for residents, {engine.info.calls_count} calls at once)"
            for engine in self._engines.all
        )
        shared_bytes = 0 if self.lender is None else self.lender.limit_bytes
        return (
            f"{port}; devices: {devices}; host memory in bytes: {self._messages_limit_bytes} for messages, "
            f"{budgets().streams_bytes} for streams, {shared_bytes} shared, {limits.host_bytes} spilled"
        )

    def budgeted_bytes(self) -> int:
        """Return the host memory that budgets count now, without the memory that is lent to clients."""
        total_bytes = self._streams_memory.taken_bytes + self._messages.taken_bytes
        for engine in self._engines.all:
            if not engine.info.has_own_memory:
                total_bytes += engine.taken_bytes
        return total_bytes

    @property
    def pooled_bytes(self) -> int:
        """The host memory that pools may keep in addition, of memory that was freed and is used again."""
        has_cards = any(engine.info.has_own_memory for engine in self._engines.all)
        machine = budgets()
        return _POOLS_COUNT * machine.pool_bytes + has_cards * machine.registered_bytes

    @property
    def engines(self) -> Sequence[Engine]:
        """The engines, one for each device."""
        return self._engines.all

    def hung_device(self, timeout_s: float) -> str | None:
        """Return a device for which a thread has waited longer than `timeout_s`; None if there is none."""
        began_s = time.monotonic() - timeout_s
        return next((e.info.id for e in self._engines.all if e.waiting_since_s < began_s), None)

    def blocked_loop(self, timeout_s: float) -> str | None:
        """Return what has not run for longer than `timeout_s` of what accepts calls; None if all of it runs."""
        is_blocked = self._direct is not None and self._direct.heartbeat.age_s > timeout_s
        return "the thread for direct connections" if is_blocked else None

    def abort_direct_calls(self, error: DeconvdError) -> None:
        """End the direct calls under way with an error, even if their threads hang."""
        if self._direct is not None:
            self._direct.abort(error)

    def withdraw(self) -> None:
        """Accept no more clients, direct calls and sessions, and give up the sockets' paths. Calls under way go on."""
        if self.lender is not None:
            self.lender.withdraw()
        if self._direct is not None:
            self._direct.withdraw()
        self.residents.drain()

    def cancel_direct_calls(self) -> None:
        """Cancel the direct calls under way."""
        if self._direct is not None:
            self._direct.cancel()

    def end_direct_calls(self, timeout_s: float) -> bool:
        """Wait until no direct call is under way, and cancel those that still are after `timeout_s`.

        Return whether none was cancelled.
        """
        return self._direct is None or self._direct.close(timeout_s)

    def close(self) -> None:
        """Close everything else than the direct connections. No call may be under way."""
        self.stream_admission.close()
        self._slices.shutdown()
        if self.lender is not None:
            self.lender.close()
        self.residents.close()
        self._engines.close()


def _listen_for_direct_calls(settings: Settings, addresses: Sequence[str]) -> list[socket.socket]:
    if not settings.takes_direct_calls:
        return []
    try:
        return listen_tcp(
            addresses,
            settings.direct_port,
            "direct calls (--direct-port)",
            shares_port=settings.shares_ports,
        )
    except AddressInUseError as error:
        if settings.direct_port:
            raise
        _log.warning(
            "there are no direct connections over TCP, and calls are made by gRPC: %s", error
        )
        return []


def _open_memory_sockets(settings: Settings, grpc_paths: Sequence[Path]) -> dict[Path, SideSocket]:
    """Return the sockets where memory is lent, by the path of the gRPC socket next to which they are.

    A server that listens on no Unix socket has one in a private folder.
    """
    if not settings.shared_memory_bytes:
        return {}
    if grpc_paths:
        return open_side_sockets(grpc_paths, SocketPurpose.MEMORY, settings.access)
    try:
        alone = open_private_socket(SocketPurpose.MEMORY, settings.access)
    except OSError as error:
        _log.warning("no memory is lent to clients on this host: %s", error)
        return {}
    return {alone.path: alone}


def _open_call_sockets(settings: Settings, grpc_paths: Sequence[Path]) -> dict[Path, SideSocket]:
    if not settings.takes_direct_calls:
        return {}
    return open_side_sockets(grpc_paths, SocketPurpose.CALLS, settings.access)


def _side_socket_name(grpc_path: Path, sides: Mapping[Path, SideSocket]) -> str:
    """Return how clients find the side socket of a gRPC socket: its name if both are in one folder, else its path."""
    side = sides.get(grpc_path)
    if side is None:
        return ""
    return side.path.name if side.path.parent == grpc_path.parent else str(side.path)


def _make_lender(
    settings: Settings,
    engines: Engines,
    sides: Sequence[SideSocket],
    instance: bytes,
    on_lost: Callable[[str], None],
) -> Lender | None:
    if not sides:
        return None
    limit_bytes = settings.shared_memory_bytes
    return Lender(
        sides,
        LoanLimits(limit_bytes, limit_bytes // 2),
        on_map=engines.register,
        spare_bytes=_spare_bytes(engines, limit_bytes),
        users={0, os.geteuid(), *settings.shared_memory_users},
        card_lender=_make_card_lender(engines),
        instance=instance,
        on_lost=on_lost,
    )


def _spare_bytes(engines: Engines, limit_bytes: int) -> int:
    """Return how much memory is kept ready for the next client: none without a card, which takes long to map it."""
    has_card = any(engine.info.card for engine in engines.all)
    is_little = limit_bytes // _SPARE_PART >= FIRST_REGION_BYTES
    return FIRST_REGION_BYTES if has_card and is_little else 0


def _make_card_lender(engines: Engines) -> CardLender | None:
    """Return the lender of the cards' memory, up to half of their budgets; None if there is no card."""
    by_card = {engine.info.card: engine for engine in engines.all if engine.info.card}
    budget_bytes = sum(engine.info.budget_bytes for engine in by_card.values())
    return (
        CardLender(by_card, LoanLimits(budget_bytes // 2, budget_bytes // 4)) if by_card else None
    )
