"""One server, as a client has it: the ways to it, the memory that it lends, what it keeps, and the calls to it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Final

import numpy as np

from deconvd.array_memory import ArrayMemory
from deconvd.direct_events import MAX_MESSAGE_BYTES as MAX_DIRECT_BYTES
from deconvd.forks import new_lock
from deconvd.ledger import parse_ledger
from deconvd.tensor import Array
from deconvd.transport import unix_path
from deconvd_client.advice import Advice
from deconvd_client.asked import LastLedger
from deconvd_client.calls import Calls
from deconvd_client.channel import open_channel
from deconvd_client.deadline import Deadline
from deconvd_client.direct_ways import way_to
from deconvd_client.grpc_transport import GrpcTransport
from deconvd_client.nearest import Nearest, TransportName
from deconvd_client.proxies import proxy_to
from deconvd_client.residents import Call, Kept, Residents
from deconvd_client.retries import Retries
from deconvd_client.rpcs import Rpcs
from deconvd_client.server_info import ServerInfo
from deconvd_client.shared_memory import Borrower
from deconvd_client.side_sockets import memory_socket
from deconvd_client.stub import Stub

if TYPE_CHECKING:
    from deconvd_client.cards import Cards

__all__ = ["Server"]

_CLOSE_S: Final = 0.8
"""How long `Server.close` waits for a server that takes nothing any more."""

_KEPT_BYTES: Final = 256 << 20
"""Memory of dropped results that is kept for the next ones: fresh memory costs more than a copy into it."""

_ON_HOST: Final = frozenset((np.ndarray, Kept))
"""Types of operands that are on no card; classes derived from them are neither."""

_WITHOUT_SHARED_MEMORY: Final = (TransportName.UNIX, TransportName.TCP, TransportName.GRPC)


class Server:
    """All that a client has of one server. Thread-safe; nothing is sent before the first call.

    Its methods raise DeconvdErrors, within the time that each call may take.

    Args:
        target: Where it can be reached in any case.
        transport: Which way tensors are to go.
        max_message_bytes: The largest response to accept.
        tenant_key: As in HoldSessionRequest.
        timeout_s: How long each call may take, in seconds.
        fail_fast: Whether a server that cannot be reached is given up at once.

    Attributes:
        nearest: The ways to it.
        memory: Memory that it lends on this host.
        residents: What it keeps.
        calls: Makes calls.
    """

    def __init__(
        self,
        target: str,
        *,
        transport: TransportName,
        max_message_bytes: int,
        tenant_key: bytes,
        timeout_s: float,
        fail_fast: bool,
    ) -> None:
        self._timeout_s = timeout_s
        self._transport = transport
        self._last = LastLedger()
        self._results = ArrayMemory(_KEPT_BYTES)
        open_stub = partial(_open_stub, transport, max_message_bytes)
        self.nearest: Nearest = Nearest(open_stub, target, transport, Retries(fail_fast=fail_fast))
        self._find_memory = partial(_memory_socket, self.nearest.far)
        is_only_way = transport is TransportName.SHARED_MEMORY
        self.memory: Borrower = Borrower(self._find_memory, is_only_way=is_only_way)
        is_lent = transport not in _WITHOUT_SHARED_MEMORY
        if not is_lent:
            self.memory.close()
        empty, last = self._results.empty, self._last
        self.residents: Residents = Residents(
            self.nearest, self.memory, tenant_key, empty, last, timeout_s
        )
        lent = self.memory if is_lent else None
        self.calls: Calls = Calls(self.nearest, lent, self.residents, empty, last, timeout_s)
        self._cards: Cards | None = None
        self._lock = new_lock()
        self._is_closed = False

    def arrays(self, call: Call) -> dict[str, Array]:
        """Make a call that may have arrays on cards, and return its results, by the names of their fields.

        They are numpy's, or cupy's where `call.at` is. Raises LostTensorError, as `Calls.arrays` does.
        """
        if _ON_HOST.issuperset(map(type, (call.at, *call.operands.values()))):
            return self.calls.arrays(call)
        if isinstance(call.at, (np.ndarray, Kept)):
            return self.calls.arrays(call.on_host())
        return self._opened_cards().arrays(call)

    def info(self) -> ServerInfo:
        """Return what it is, what it runs on and how much it takes."""
        deadline = Deadline(self._timeout_s)
        session = self.residents.session_name
        return ServerInfo.from_message(self.nearest.server_info(deadline, session))

    def health(self) -> str:
        """Return its health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        return self.nearest.health(Deadline(self._timeout_s))

    @property
    def last_ledger(self) -> dict[str, int]:
        """Where the time of the calling thread's last call went there, in microseconds."""
        return parse_ledger(self._last.text)

    def close(self) -> None:
        """Close all that is open, within a second. Calls under way, and later ones, raise CallCancelledError."""
        self._is_closed = True
        deadline = Deadline(_CLOSE_S)
        if self._cards is not None:
            self._cards.close(deadline.within(_CLOSE_S / 4))
        self.residents.close(deadline.within(_CLOSE_S / 2))
        self.nearest.close(deadline)
        self.memory.close()
        self._results.clear()

    def state(self) -> Iterator[str]:
        """Yield in words which way calls go now, and what is open, as far as is known without asking."""
        if self._is_closed:
            yield "closed"
            return
        stub = self.nearest.taken
        if stub is None:
            return  # nothing is known before the first call
        way = "a Unix socket" if unix_path(stub.target) else "TCP"
        yield f"by shared memory and {way}" if self.memory.borrowed_bytes else f"by {way}"
        if stub.direct is None:
            yield "gRPC alone"
        else:
            yield f"{stub.direct}"
        if self.residents.has_session:
            yield "session open"

    def _opened_cards(self) -> Cards:
        from deconvd_client.cards import Cards

        with self._lock:
            if self._cards is None:
                self._cards = Cards(self.calls, self._find_memory, self._timeout_s)
                if self._transport in _WITHOUT_SHARED_MEMORY:
                    self._cards.close(Deadline(0))
            return self._cards


def _open_stub(transport: TransportName, max_message_bytes: int, target: str) -> Stub:
    """Return the stub of a target; nothing is sent yet."""
    proxy = proxy_to(target)
    rpcs = Rpcs(lambda: open_channel(target, max_message_bytes=max_message_bytes, proxy=proxy))
    is_direct = transport is not TransportName.GRPC and max_message_bytes >= MAX_DIRECT_BYTES
    way = way_to(target) if is_direct else None
    return Stub(target, GrpcTransport(rpcs, Advice(target, proxy)), way)


def _memory_socket(far: Stub, deadline: Deadline) -> str:
    """Return where the server lends memory; empty if it lends none here."""
    return memory_socket(far.get_server_info(deadline), unix_path(far.target))
