"""Everything a client has of one server: the route to it, the memory it lends, its residents, and the calls to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from deconvd.direct.events import MAX_MESSAGE_BYTES as MAX_DIRECT_BYTES
from deconvd.host.buffer_pool import BufferPool
from deconvd.host.forks import new_lock
from deconvd.host.machine import memory_bytes
from deconvd.model.dtypes import Array, DType
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_options import unix_path
from deconvd.wire.ledger import parse_ledger
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.ledgers import LedgerRecorder
from deconvd_client.calls.patience import Patience
from deconvd_client.calls.transfer import Transfer
from deconvd_client.credentials import Credentials
from deconvd_client.dispatch import Dispatcher
from deconvd_client.residents import Call, Resident, ResidentExecutor
from deconvd_client.server_info import ServerInfo
from deconvd_client.shared_memory import Borrower
from deconvd_client.transports.direct.connectors import connector_for
from deconvd_client.transports.direct.pool import ConnectionGate
from deconvd_client.transports.grpc.channel import open_channel
from deconvd_client.transports.grpc.error_hints import ErrorHints
from deconvd_client.transports.grpc.proxies import proxy_for
from deconvd_client.transports.grpc.rpcs import RpcChannel
from deconvd_client.transports.grpc.transport import GrpcTransport
from deconvd_client.transports.retry_policy import RetryPolicy
from deconvd_client.transports.route import Route, TransportName
from deconvd_client.transports.side_sockets import (
    Owners,
    any_owner,
    find_memory_socket,
    trusted_owners,
)
from deconvd_client.transports.stub import Stub

if TYPE_CHECKING:
    from deconvd_client.card_calls import CardDispatcher

__all__ = ["Server"]

_T = TypeVar("_T")

_CLOSE_TIMEOUT_S: Final = 0.8
"""How long `Server.close` waits for a server that no longer reads."""

_DISCOVERY_PATIENCE_S: Final = 0.02
"""How long the calls of a connection over TCP wait, all together, for what is found out about the server meanwhile.

On the server's host it is found out within this time. Elsewhere gRPC takes as long to connect, so that no call waits in
vain.
"""

_LEAST_POOL_BYTES: Final = 256 << 20
_MOST_POOL_BYTES: Final = 1 << 30
_POOL_PART: Final = 16
"""Memory of dropped results is kept for the next ones, since fresh memory costs more than a copy into it: one part in
so many of what this process may use, within bounds."""

_RESULT_SPARE_PART: Final = 1 / 8
"""By which part the memory of a result may be larger than the result: so results of many shapes share it."""

_HOST_TYPES: Final = frozenset((np.ndarray, Resident))
"""Types of operands that are not on a card. Classes derived from them need a closer look."""

_MESSAGE_ONLY_TRANSPORTS: Final = (TransportName.UNIX, TransportName.TCP, TransportName.GRPC)


class Server:
    """Everything a client has of one server. Thread-safe. Nothing is sent before the first call.

    Its methods raise DeconvdErrors, within the time that each call may take.

    Args:
        target: Where it can always be reached.
        transport: How tensors travel.
        max_message_bytes: The largest response to accept.
        tenant_key: As in HoldSessionRequest.
        credentials: What it shows of itself, and how it knows the server.
        timeout_s: How long each call may take, in seconds.
        fail_fast: Whether a call fails at once if the server cannot be reached.
        discovery_s: How long its calls wait, all together, for what is found out about a server over TCP; None for a
            moment.
        retries: Retries its calls; None for what `fail_fast` says.
        ledgers: Records the ledgers of its calls; None if it is alone.
        note_info: Called with each GetServerInfo response of it; None if nobody needs to know.

    Attributes:
        route: Leads to the server.
        borrower: Memory that it lends on this host.
        residents: The tensors that it keeps.
        ledgers: Say where the time of its calls went.
        dispatcher: Makes calls whose operands are on the host.
        gate: Says whether direct connections may be opened.
        result_pool: Memory for large results that are not in shared memory.
    """

    def __init__(
        self,
        target: str,
        *,
        transport: TransportName,
        max_message_bytes: int,
        tenant_key: bytes,
        credentials: Credentials,
        timeout_s: float,
        fail_fast: bool,
        discovery_s: float | None = None,
        retries: RetryPolicy | None = None,
        ledgers: LedgerRecorder | None = None,
        note_info: Callable[[pb.GetServerInfoResponse], None] | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._transport = transport
        self.ledgers: LedgerRecorder = ledgers or LedgerRecorder()
        self.result_pool: BufferPool = BufferPool(
            _result_pool_bytes(), spare_part=_RESULT_SPARE_PART
        )
        self.gate: ConnectionGate = ConnectionGate()
        patience_s = _DISCOVERY_PATIENCE_S if discovery_s is None else discovery_s
        patience = Patience() if unix_path(target) else Patience(patience_s)
        owners = any_owner if credentials.is_empty else partial(trusted_owners, unix_path(target))
        open_stub = partial(
            _open_stub,
            transport,
            max_message_bytes,
            patience,
            credentials,
            owners,
            note_info,
            self.gate,
        )
        retries = retries or RetryPolicy(fail_fast=fail_fast)
        self.route: Route = Route(open_stub, target, transport, retries, patience, owners)
        self._find_memory = partial(_find_memory_socket, self.route.target_stub, owners)
        is_only_way = transport is TransportName.SHARED_MEMORY
        self.borrower: Borrower = Borrower(
            self._find_memory, is_only_way=is_only_way, patience=patience
        )
        is_lent = transport not in _MESSAGE_ONLY_TRANSPORTS
        if not is_lent:
            self.borrower.close()
        empty = self.result_pool.empty
        self.residents: ResidentExecutor = ResidentExecutor(
            self.route, self.borrower, tenant_key, empty, self.ledgers, timeout_s, patience
        )
        borrower = self.borrower if is_lent else None
        self.dispatcher: Dispatcher = Dispatcher(
            self.route, borrower, self.residents, empty, self.ledgers, timeout_s
        )
        self._card_dispatcher: CardDispatcher | None = None
        self._lock = new_lock()
        self._is_closed = False

    def execute(self, call: Call, deadline: Deadline | None = None) -> dict[str, Array]:
        """See `CallExecutor`.

        Args:
            deadline: When the caller must have an answer; None for the time that each call may take.
        """
        if _HOST_TYPES.issuperset(map(type, (call.results_like, *call.operands.values()))):
            return self.dispatcher.execute(call, deadline)
        if isinstance(call.results_like, (np.ndarray, Resident)):
            return self.dispatcher.execute(call.with_host_arrays(), deadline)
        return self._get_card_dispatcher().execute(call, deadline)

    def execute_and_keep(self, call: Call, deadline: Deadline | None = None) -> dict[str, Resident]:
        """See `CallExecutor`."""
        return self.dispatcher.execute_and_keep(call, deadline)

    def run(
        self, method: Callable[[Server, Call, Deadline], _T], call: Call, deadline: Deadline
    ) -> _T:
        """Make a call by a method of this class, as `Replica` has it."""
        return method(self, call, deadline)

    def execute_into(self, call: Call, transfer: Transfer) -> None:
        """Make a call whose arrays are on the host, as `Dispatcher.execute_into` does."""
        self.dispatcher.execute_into(call, transfer)

    @property
    def current_transport(self) -> TransportName | None:
        """What large tensors travel by now; None before the first call. Small calls can go by another."""
        stub = self.route.current_stub
        if stub is None:
            return None
        if self.borrower.borrowed_bytes:
            return TransportName.SHARED_MEMORY
        if stub.direct is None or not stub.direct.has_connections:
            return TransportName.GRPC
        return TransportName.UNIX if unix_path(stub.target) else TransportName.TCP

    def info(self, deadline: Deadline | None = None) -> ServerInfo:
        """Return the server's version, devices and limits."""
        limit = deadline or Deadline(self._timeout_s)
        session = self.residents.session_name
        return ServerInfo.from_message(self.route.server_info(limit, session))

    def health(self, deadline: Deadline | None = None) -> str:
        """Return its health: ``SERVING``, ``NOT_SERVING`` or another of gRPC's status names."""
        return self.route.health(deadline or Deadline(self._timeout_s))

    @property
    def last_ledger(self) -> dict[str, int]:
        """Where the time of this thread's last call went on the server, in microseconds."""
        return parse_ledger(self.ledgers.last_text)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """Return a new array, in shared memory if possible. Raises InvalidArgumentError, as `Borrower.empty` does."""
        return self.borrower.empty(shape, dtype, Deadline(self._timeout_s))

    @property
    def is_lending(self) -> bool:
        """Whether it is known to lend memory on this host. It is not asked."""
        return self.borrower.is_lending

    def lends_memory(self) -> bool:
        """Return whether it lends memory on this host, as far as is known within the time of a call."""
        return self.borrower.has_lender(Deadline(self._timeout_s))

    def clear_last_ledger(self) -> None:
        """Forget the ledger of this thread's last call."""
        self.ledgers.forget_last()

    @property
    def direct_connections_count(self) -> int:
        """How many direct connections there are now, in use or not."""
        stub = self.route.current_stub
        return 0 if stub is None or stub.direct is None else stub.direct.connections_count

    def open_direct_connection(self) -> None:
        """Open one more direct connection for later calls, if that is possible."""
        stub = self.route.current_stub
        if stub is not None and stub.direct is not None:
            stub.direct.open_idle()

    def release_idle(self) -> None:
        """Close the direct connections that no call uses, and give back the memory that no array uses."""
        stub = self.route.current_stub
        if stub is not None and stub.direct is not None:
            stub.direct.close_idle()
        self.borrower.give_back_unused(Deadline(_CLOSE_TIMEOUT_S))

    def close(self) -> None:
        """Close all connections, within a second. Calls under way, and later ones, raise CallCancelledError."""
        self._is_closed = True
        deadline = Deadline(_CLOSE_TIMEOUT_S)
        if self._card_dispatcher is not None:
            self._card_dispatcher.close(deadline.with_limit(_CLOSE_TIMEOUT_S / 4))
        self.residents.close(deadline.with_limit(_CLOSE_TIMEOUT_S / 2))
        self.route.close(deadline)
        self.borrower.close()
        self.result_pool.clear()

    def describe(self) -> Iterator[str]:
        """Yield in words how calls travel now, and what is open, as far as is known without asking the server."""
        if self._is_closed:
            yield "closed"
            return
        stub = self.route.current_stub
        if stub is None:
            return  # nothing is known before the first call
        socket = "a Unix socket" if unix_path(stub.target) else "TCP"
        yield f"by shared memory and {socket}" if self.borrower.borrowed_bytes else f"by {socket}"
        if stub.direct is None:
            yield "gRPC alone"
        else:
            yield f"{stub.direct}"
        if self.residents.has_session:
            yield "session open"

    def _get_card_dispatcher(self) -> CardDispatcher:
        from deconvd_client.card_calls import CardDispatcher  # imports cupy

        with self._lock:
            if self._card_dispatcher is None:
                self._card_dispatcher = CardDispatcher(
                    self.dispatcher, self._find_memory, self._timeout_s
                )
                if self._transport in _MESSAGE_ONLY_TRANSPORTS:
                    self._card_dispatcher.close(Deadline(0))
            return self._card_dispatcher


def _open_stub(
    transport: TransportName,
    max_message_bytes: int,
    patience: Patience,
    credentials: Credentials,
    owners: Owners,
    note_info: Callable[[pb.GetServerInfoResponse], None] | None,
    gate: ConnectionGate,
    target: str,
) -> Stub:
    """Return the stub of a target; nothing is sent yet."""
    proxy = proxy_for(target)
    is_near = bool(unix_path(target))  # so a connection is open in a moment
    if is_near:
        credentials = credentials.without_tls()
    rpcs = RpcChannel(
        lambda: open_channel(
            target, max_message_bytes=max_message_bytes, proxy=proxy, credentials=credentials
        ),
        credentials,
    )
    is_direct = transport is not TransportName.GRPC and max_message_bytes >= MAX_DIRECT_BYTES
    connector = connector_for(target, credentials, owners) if is_direct else None
    grpc = GrpcTransport(rpcs, ErrorHints(target, proxy, credentials))
    return Stub(target, grpc, connector, Patience() if is_near else patience, note_info, gate)


@cache
def _result_pool_bytes() -> int:
    """Return how much memory of dropped results each server's pool keeps."""
    with suppress(AttributeError, OSError, ValueError):  # other systems than Linux may not tell
        return min(max(memory_bytes() // _POOL_PART, _LEAST_POOL_BYTES), _MOST_POOL_BYTES)
    return _LEAST_POOL_BYTES


def _find_memory_socket(stub: Stub, owners: Owners, deadline: Deadline) -> str:
    """Return the path of the socket where the server lends memory; empty if it lends none on this host."""
    return find_memory_socket(stub.find_sockets("memory", deadline), unix_path(stub.target), owners)
