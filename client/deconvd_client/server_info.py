"""What a server says of itself."""

from __future__ import annotations

from dataclasses import dataclass, fields

from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.cache_state import CacheState
from deconvd.wire.tensor import element_type_from_number

__all__ = ["DeviceDescription", "ServerInfo"]


@dataclass(frozen=True, slots=True)
class DeviceDescription:
    """Something that computes.

    Attributes:
        id: As in the server's ``--device``: ``cpu``, ``cuda:0``.
        name: The maker's name for it.
        memory_bytes: What it has in all.
        threads_count: Threads that compute on it; 0 on a GPU.
        budget_bytes: What the calls under way may take of its memory, all together.
        used_bytes: What they take now.
        running_calls_count: How many calls run.
        waiting_calls_count: How many wait for their turn.
        caches: What it keeps between calls; of tensors that stay on the server, those of the connection's own
            tenant.
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

    @classmethod
    def from_message(cls, message: pb.Device) -> DeviceDescription:
        """Return what a message says."""
        plain = {
            field.name: getattr(message, field.name)
            for field in fields(cls)
            if field.name != "caches"
        }
        return cls(**plain, caches=tuple(map(CacheState.from_message, message.caches)))


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server is.

    Attributes:
        version: Of deconvd.
        devices: What it computes on.
        element_types: Names of the element types that it takes, of those that this client knows.
        max_message_bytes: The largest request and the largest response.
        features: Names of the optional parts of the contract that it has.
        direct_port: The TCP port where it takes direct calls; 0 if there is none.
    """

    version: str
    devices: tuple[DeviceDescription, ...]
    element_types: tuple[str, ...]
    max_message_bytes: int
    features: tuple[str, ...]
    direct_port: int

    @classmethod
    def from_message(cls, message: pb.GetServerInfoResponse) -> ServerInfo:
        """Return what a response says."""
        dtypes = (element_type_from_number(number) for number in message.element_types)
        return cls(
            version=message.version,
            devices=tuple(map(DeviceDescription.from_message, message.devices)),
            element_types=tuple(dtype.name for dtype in dtypes if dtype is not None),
            max_message_bytes=message.limits.message_bytes,
            features=tuple(message.features),
            direct_port=message.direct_port,
        )
