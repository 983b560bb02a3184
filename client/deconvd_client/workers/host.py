"""What is behind the target of one server: a process that serves alone, or the workers of a host."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Final, TypeVar

import numpy as np

from deconvd.errors import DeconvdError
from deconvd.host.forks import new_lock, register_fork_reset
from deconvd.model.dtypes import Array, DType
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_options import unix_path
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.calls.shared_task import SharedTask
from deconvd_client.credentials import Credentials
from deconvd_client.residents import Call, Resident
from deconvd_client.server import Server
from deconvd_client.server_info import ServerInfo
from deconvd_client.shared_memory.memory_kind import HOST_MEMORY
from deconvd_client.transports.retry_policy import RetryPolicy
from deconvd_client.transports.route import TransportName
from deconvd_client.transports.side_sockets import any_owner, trusted_owners
from deconvd_client.workers.addresses import is_shared, worker_targets
from deconvd_client.workers.weak_call import weak_call
from deconvd_client.workers.worker_set import WorkerSet

__all__ = ["Host"]

_T = TypeVar("_T")

_DISCOVERY_TIMEOUT_S: Final = 5.0
"""How long a server may take to say for the first time whether it has workers."""

_SET_PATIENCE_S: Final = 1.0
"""The same in a set of servers. There another one takes the call of a server that is silent for a little longer."""

_FAR_PATIENCE_S: Final = 0.02
"""How long a call with large tensors waits for that over TCP, as for all that is found out about a server."""


class Host:
    """What is behind the target of one server. It has the methods of `Server` that a connection uses. Thread-safe.

    It can also be one of several servers: a `Replica`.

    Until the server has said whether it has workers, and if it has none, calls go to its `entry`, as if this class did
    not exist. What one worker keeps or lends waits for the answer: tensors that are put, large operands and `empty`. If
    there are workers, calls are theirs as soon as one has proved to be there.

    Args:
        target: Where the server is.
        credentials: What the client shows of itself.
        transport: How tensors travel.
        open_server: Returns the server at a target, to which nothing is sent yet.
        timeout_s: How long each call may take, in seconds.
        fail_fast: Whether a call fails at once if the server cannot be reached.
        retries: Retries its calls, if it is one of several servers; None if it is alone, for what `fail_fast` says.
        ledgers: Records the ledgers of its calls; None if it is alone.

    Attributes:
        entry: The server at the target, whichever process answers there.
        ledgers: Say where the time of calls went.
    """

    def __init__(
        self,
        target: str,
        credentials: Credentials,
        transport: TransportName,
        open_server: Callable[..., Server],
        *,
        timeout_s: float,
        fail_fast: bool,
        retries: RetryPolicy | None = None,
        ledgers: LedgerRecorder | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._fail_fast = fail_fast
        self._is_replica = retries is not None
        self._open_worker = partial(open_server, credentials=credentials)
        path = unix_path(target)
        self._find_targets = partial(
            worker_targets,
            target=target,
            transport=transport,
            credentials=credentials,
            owners=any_owner if credentials.is_empty else partial(trusted_owners, path),
        )
        self._is_shared = partial(is_shared, target)
        self._kept_patience_s = _SET_PATIENCE_S if self._is_replica else _DISCOVERY_TIMEOUT_S
        self._patience_s = self._kept_patience_s if path else _FAR_PATIENCE_S
        self.entry: Server = open_server(
            target,
            credentials=credentials,
            retries=retries,
            ledgers=ledgers,
            note_info=weak_call(self._note_info),
        )
        self.ledgers: LedgerRecorder = self.entry.ledgers
        self._is_settled = False
        # a direct connection asks what the server is made of, gRPC alone does not
        self._must_ask = self.entry.route.target_stub.direct is None
        self._discovery = SharedTask()
        self._lock = new_lock()
        self._info: pb.GetServerInfoResponse | None = None  # the last answer of the entry
        self._workers: WorkerSet | None = None
        self._way: Server | WorkerSet = self.entry
        self._is_closed = False
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Settle in a forked child what was not settled: the thread that looked for workers is not there."""
        workers = self._workers
        if workers is not None and workers.has_home:
            self._take_way()
            self._is_settled = True
        elif not self._is_settled:
            self._info = self._workers = None
            self.entry.gate.is_open = True
            self.entry.route.target_stub.forget_info()  # whose answer is to be noted here, too

    @property
    def residents(self) -> Host:
        """See `CallExecutor`."""
        return self

    def execute(self, call: Call) -> dict[str, Array]:
        """See `CallExecutor`.

        Once it is settled who makes the calls, their own method replaces this one: small calls notice each function.
        """
        deadline = Deadline(self._timeout_s)
        self._settle_for(call, deadline)
        if isinstance(self._way, Server):
            return self._way.execute(call, deadline)
        return self._way.execute(call)

    def run(
        self, method: Callable[[Server, Call, Deadline], _T], call: Call, deadline: Deadline
    ) -> _T:
        """See `Replica`."""
        if not self._is_settled:
            self._settle_for(call, deadline)
        return self._way.run(method, call, deadline)

    def execute_and_keep(self, call: Call, deadline: Deadline | None = None) -> dict[str, Resident]:
        """See `CallExecutor`."""
        limit = deadline or Deadline(self._timeout_s)
        self._settle(limit, self._kept_patience_s)
        return self._way.execute_and_keep(call, limit)

    def put(self, array: Array, deadline: Deadline | None = None) -> Resident:
        """See `ResidentStore` and `ReplicaResidents`."""
        limit = deadline or Deadline(self._timeout_s)
        self._settle(limit, self._kept_patience_s)
        return self._way.residents.put(array, limit)

    def get(self, resident: Resident, deadline: Deadline | None = None) -> Array:
        """See `ResidentStore` and `ReplicaResidents`."""
        return self._way.residents.get(resident, deadline)

    def knows_session(self, name: bytes) -> bool:
        """See `ReplicaResidents`."""
        # that of the entry may have begun before there were workers, which have the entry among them
        owner = self.entry if self._workers is None else self._workers
        return owner.residents.knows_session(name)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return a new array, as `Server.empty` and `WorkerSet.empty` do."""
        self._settle(Deadline(self._timeout_s), self._kept_patience_s)
        return self._way.empty(shape, dtype)

    def info(self, deadline: Deadline | None = None) -> ServerInfo:
        """Return what the server says about itself; of several workers, what the one says that the client keeps to."""
        return self._way.info(deadline)

    def health(self, deadline: Deadline | None = None) -> str:
        """Return ``SERVING`` if the server, or one of its workers, serves; else another of gRPC's status names."""
        return self._way.health(deadline)

    @property
    def last_ledger(self) -> dict[str, int]:
        """See `Server.last_ledger`."""
        return self.entry.last_ledger

    def clear_last_ledger(self) -> None:
        """Forget the ledger of this thread's last call."""
        self.ledgers.forget_last()

    @property
    def is_lending(self) -> bool:
        """Whether memory is known to be lent on this host. Nobody is asked."""
        return self._way.is_lending

    def lends_memory(self) -> bool:
        """Return whether the server lends memory on this host, as far as is known within the time of a call."""
        return self._way.lends_memory()

    def close(self) -> None:
        """Close all connections, within a second. Calls under way, and later ones, raise CallCancelledError."""
        with self._lock:
            self._is_closed = True
            workers = self._workers
        if workers is None:
            self.entry.close()
        else:
            workers.close()

    def describe(self) -> Iterable[str]:
        """Return in words how calls travel now, and what is open, as far as is known without asking the server."""
        return ["closed"] if self._is_closed else self._way.describe()

    def _settle_for(self, call: Call, deadline: Deadline) -> None:
        """Wait as long as a call should until it is settled who makes it."""
        if any(map(_is_bound, call.operands.values())):
            self._settle(deadline, self._patience_s)
        elif self._must_ask:
            self._settle(deadline, 0.0)

    def _settle(self, deadline: Deadline, patience_s: float) -> None:
        """Wait until it is settled who makes the calls, as far as there is time."""
        if not self._is_settled:
            self._discovery.run(self._find_workers, min(patience_s, deadline.remaining_s()))

    def _note_info(self, info: pb.GetServerInfoResponse) -> None:
        """Note an answer of the entry. Other threads wait for the one that has asked, so this must be quick."""
        self._info = info
        workers = self._workers
        if workers is not None:
            workers.note_answer(info)
        elif self._is_shared(info):
            if (
                not self._must_ask
            ):  # else whoever makes a call asks, and whoever only looks uses no worker
                # a direct connection would seem to be that of a client which keeps to the worker that answers here
                self.entry.gate.is_open = False
                self._discovery.run(self._find_workers, 0.0)
        elif not self._is_settled:
            self._take_way()
            self._is_settled = True

    def _find_workers(self) -> None:
        """Find out whether there are workers, and have one as the home if there are."""
        if self._info is None:
            with suppress(DeconvdError):  # the calls themselves will tell
                self.entry.route.target_stub.get_server_info(Deadline(_DISCOVERY_TIMEOUT_S))
        info = self._info
        workers = None if info is None or not self._is_shared(info) else self._open_workers()
        if info is None or workers is None:
            return  # not known yet, or `_note_info` has settled it
        try:
            workers.begin(info)
            if workers.has_home:
                self.entry.release_idle()
        finally:
            self._take_way()
            self._is_settled = True

    def _open_workers(self) -> WorkerSet | None:
        """Return the set of workers, still empty; None if this is closed, or there is one already."""
        with self._lock:
            if self._is_closed or self._workers is not None:
                return None
            self._workers = WorkerSet(
                self.entry,
                self._open_worker,
                self._find_targets,
                self.ledgers,
                timeout_s=self._timeout_s,
                fail_fast=self._fail_fast,
                is_replica=self._is_replica,
                on_order=weak_call(self._take_way),
            )
            return self._workers

    def _take_way(self) -> None:
        """Have calls made by the workers if one of them can be used, else by the entry."""
        workers = self._workers
        self._way = self.entry if workers is None or not workers.has_home else workers
        self.entry.gate.is_open = self._way is self.entry
        self.execute = self._way.execute  # type: ignore[method-assign]  # see `execute`


def _is_bound(operand: object) -> bool:
    """Return whether an operand should be at the worker that will have the next ones."""
    return not isinstance(operand, np.ndarray) or operand.nbytes >= HOST_MEMORY.min_tensor_bytes
