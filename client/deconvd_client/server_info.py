"""What a server tells about itself: its version, devices and limits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.cache_state import CacheState
from deconvd.wire.server_counts import ServerCounts
from deconvd.wire.tensor import element_type_from_number

__all__ = ["DeviceDescription", "ServerInfo", "WorkerDescription"]


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """A device that a server computes on.

    Attributes:
        id: As in the server's ``--device``: ``cpu``, ``cuda:0``.
        name: The product name.
        memory_bytes: Size of its memory.
        threads_count: Threads that compute on it; 0 on a GPU.
        budget_bytes: How much of its memory all running calls together may use.
        used_bytes: How much of it they use now.
        running_calls_count: How many calls run.
        waiting_calls_count: How many calls wait for their turn.
        caches: Its caches. Of the residents, only those of the connection's own tenant are counted.
        busy_us: For how long at least one call has run on it, since the server started; 0 if the server does not know.
    """

    id: str
    name: str
    memory_bytes: int
    threads_count: int
    budget_bytes: int
    used_bytes: int
    running_calls_count: int
    waiting_calls_count: int
    caches: tuple[CacheState, ...]
    busy_us: int = 0

    @classmethod
    def from_message(cls, message: pb.Device) -> DeviceDescription:
        """Return the description in a message."""
        plain = {
            field.name: getattr(message, field.name)
            for field in fields(cls)
            if field.name != "caches"
        }
        return cls(**plain, caches=tuple(map(CacheState.from_message, message.caches)))


@dataclass(frozen=True, slots=True)
class WorkerDescription:
    """One of the processes of a server that has several.

    Attributes:
        name: Its number, from ``0`` on.
        devices: The ids of its devices, as in `DeviceDescription`.
        is_serving: Whether it serves, as the process knows that was asked.
        active_connections_count: How many of its direct connections have carried a call in the last two seconds, as of
            a second ago.
    """

    name: str
    devices: tuple[str, ...]
    is_serving: bool
    active_connections_count: int

    @classmethod
    def from_message(cls, message: pb.Worker) -> WorkerDescription:
        """Return the description in a message."""
        return cls(
            message.name,
            tuple(message.devices),
            message.is_serving,
            message.active_connections_count,
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server tells about itself.

    Attributes:
        version: Its version of deconvd.
        devices: The devices that it computes on.
        element_types: Names of the element types that it accepts and this client knows.
        max_message_bytes: Size of the largest request or response.
        features: Names of the optional features that it supports.
        direct_port: The TCP port where it accepts direct connections; 0 if it accepts none.
        instance_id: Another one after each start of the server.
        counts: What it has done, and what it has in use; None if it is too old to count. To a client with a token or a
            certificate it counts the calls of that client's identity alone.
        worker_name: If the server has several processes, the name of the one that all of this is about, except
            `workers`; else empty.
        workers: The processes of a server that has several; else empty.
    """

    version: str
    devices: tuple[DeviceDescription, ...]
    element_types: tuple[str, ...]
    max_message_bytes: int
    features: tuple[str, ...]
    direct_port: int
    instance_id: str = ""
    counts: ServerCounts | None = None
    worker_name: str = ""
    workers: tuple[WorkerDescription, ...] = ()

    @classmethod
    def from_message(cls, message: pb.GetServerInfoResponse) -> ServerInfo:
        """Return the information in a response."""
        dtypes = (element_type_from_number(number) for number in message.element_types)
        return cls(
            version=message.version,
            devices=tuple(map(DeviceDescription.from_message, message.devices)),
            element_types=tuple(dtype.name for dtype in dtypes if dtype is not None),
            max_message_bytes=message.limits.message_bytes,
            features=tuple(message.features),
            direct_port=message.direct_port,
            instance_id=message.instance_id,
            counts=(
                ServerCounts.from_message(message.counts) if message.HasField("counts") else None
            ),
            worker_name=message.worker_name,
            workers=tuple(map(WorkerDescription.from_message, message.workers)),
        )
