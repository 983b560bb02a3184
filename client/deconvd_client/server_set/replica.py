"""The interface of what stands for one server of a set: a process that serves alone, or a host with several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from deconvd.model.dtypes import Array, DType
from deconvd_client.calls.deadline import Deadline
from deconvd_client.residents import Call, Resident
from deconvd_client.server import Server
from deconvd_client.server_info import ServerInfo

__all__ = ["Replica", "ReplicaResidents"]

_T = TypeVar("_T")


class ReplicaResidents(Protocol):
    """The tensors that one server keeps, in the sessions of its processes. Thread-safe."""

    def put(self, array: Array, deadline: Deadline | None = None) -> Resident:
        """Send an array, and return the resident."""

    def get(self, resident: Resident, deadline: Deadline | None = None) -> Array:
        """Return the elements of a resident as a new array. Raises LostTensorError."""

    def knows_session(self, name: bytes) -> bool:
        """Return whether the session of that name is open there."""


class Replica(Protocol):
    """One of several servers that do the same. Thread-safe.

    Its methods raise a DeconvdError by the deadline, and try nothing again that another server could do.
    """

    @property
    def residents(self) -> ReplicaResidents:
        """The tensors that it keeps."""

    def run(
        self, method: Callable[[Server, Call, Deadline], _T], call: Call, deadline: Deadline
    ) -> _T:
        """Make a call at the process that suits it, by a method of `Server`."""

    def execute_and_keep(self, call: Call, deadline: Deadline | None = None) -> dict[str, Resident]:
        """See `CallExecutor`."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return a new array, in shared memory if possible."""

    def info(self, deadline: Deadline | None = None) -> ServerInfo:
        """Return what it says about itself."""

    def health(self, deadline: Deadline | None = None) -> str:
        """Return its health, in one of gRPC's words."""

    @property
    def is_lending(self) -> bool:
        """Whether it is known to lend memory on this host. It is not asked."""

    def lends_memory(self) -> bool:
        """Return whether it lends memory on this host."""

    def close(self) -> None:
        """Close all connections, within a second."""
