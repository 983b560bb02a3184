"""The processes that serve as one, as each of them knows them, and how a name tells which of them has made it.

A supervisor starts such processes: see `deconvd_server.supervision`. A process that serves alone has an empty table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["MAX_WORKERS_COUNT", "WORKERS", "ConnectionLoad", "WorkerTable"]

MAX_WORKERS_COUNT: Final = 128
"""The most processes that serve as one: the first byte of a secret name has their numbers."""


class ConnectionLoad(NamedTuple):
    """The direct connections of a process, by which clients that begin get their homes.

    Attributes:
        recent_count: How many there are that have begun, or carried a call, within the last ten seconds.
        begun_count: How many have begun since the process has.
    """

    recent_count: int
    begun_count: int


class WorkerTable:
    """All processes that serve as one. Any thread may read it while another one replaces it.

    Attributes:
        name: This process's name, which is its number; empty if it serves alone.
        workers: All of them, this one included; empty if it serves alone.
        tell_load: Tells whoever names homes what this process's direct connections are.
        request_home: Returns the name of the process to which a client that begins should keep; empty if nobody knows.
    """

    def __init__(self) -> None:
        self.name = ""
        self.workers: Sequence[pb.Worker] = ()
        self.tell_load: Callable[[], None] = lambda: None
        self.request_home: Callable[[], str] = str

    @property
    def mark(self) -> bytes:
        """What the secret names of this process begin with: the byte of its number, or nothing if it serves alone."""
        return bytes([int(self.name)]) if self.name else b""

    def hint(self, secret_name: bytes) -> str:
        """Return where a name may be known that is not known here, as the end of a message; empty if nobody knows."""
        number = secret_name[:1].hex()
        for worker in self.workers:
            if worker.name != self.name and number == f"{int(worker.name):02x}":
                return (
                    f"; worker {worker.name} has made it, which alone answers on {_where(worker)}"
                )
        return ""


def _where(worker: pb.Worker) -> str:
    port = [f"port {worker.grpc_port}"] if worker.grpc_port else []
    return " and ".join([*port, *(f"unix:{path}" for path in worker.unix_sockets)])


WORKERS: Final = WorkerTable()
"""The table of this process."""
