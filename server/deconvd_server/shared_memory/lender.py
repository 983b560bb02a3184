"""Lends memory to clients on this host, over a Unix socket of its own.

Threads: the lender's thread does all socket I/O, and alone uses the list of clients. The mapper's thread maps and
unmaps memory, which takes a while. They hand work to each other (`Executor.submit`, `Listener.call_soon`) and share
no lock. Any thread may call the public methods.

    lender's thread:  _accept --> _read --+              +--> _deliver --> ... --> _drop --+
    mapper's thread:                      +--> _perform -+                                 +--> LoanRegistry.close
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Final

from deconvd.errors import StaleRegionError, UnavailableError
from deconvd.lending.protocol import (
    REGION_NAME_BYTES,
    LendingOperation,
    LendingReply,
    LendingRequest,
    ReplyStatus,
)
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.log_text import excerpt
from deconvd_server.resources.accept_loop import Listener
from deconvd_server.resources.fair_shares import FairShares, PeerPlace
from deconvd_server.resources.peer_identity import peer_key_of_connection
from deconvd_server.resources.unix_listener import PeerCredentials, SideSocket, peer_credentials
from deconvd_server.resources.worker_table import WORKERS
from deconvd_server.shared_memory.cuda_ipc import CardBorrowing, CardLender
from deconvd_server.shared_memory.loans import (
    RESERVED_PART,
    BorrowerAccount,
    LoanLimits,
    LoanRegistry,
    OverLimitError,
    RegionUse,
)
from deconvd_server.shared_memory.memfd_watcher import MemfdWatcher
from deconvd_server.shared_memory.memory import OnMap, SealedMemory, Unmap
from deconvd_server.shared_memory.spare_memory import SpareMemory

__all__ = ["Lender"]

_MAX_PACKET_BYTES: Final = 64  # larger than a request, so that a longer packet is noticed
_NO_INSTANCE: Final = bytes(REGION_NAME_BYTES)
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

_log = logging.getLogger(__name__)


def _register_nothing(_address: int, _size_bytes: int) -> Unmap:
    return lambda: None


class Lender:
    """Lends sealed memory to clients on this host, and finds the tensors that calls name in it.

    The server allocates all memory itself, so a client cannot name memory that is not its own. When a
    client's connection closes, however the client dies, its regions are retired; each is unmapped after
    the last call that uses it. A region counts against the limits until the client has unmapped it, too.

    Args:
        side_sockets: The sockets where it listens. It removes and closes them.
        limits: How much it lends.
        on_map: Called with the address and the size of newly mapped memory, before anyone uses it. Returns
            a function that is called after the last use, before the memory is unmapped. Both may be called
            in any thread. If `on_map` raises, the client is told that there is no memory.
        spare_bytes: Size of a region that is kept mapped, beyond the limits, for the next client that asks for as much;
            0 for none.
        users: Ids of the users that it lends to. By default the server's own user and root.
        card_lender: Lends memory of cards; None if the server has no cards.
        instance: The server's id, for clients that ask whose socket it is.
        on_lost: Called with the name of the thread if an unforeseen error ends the thread that talks to clients.
    """

    def __init__(
        self,
        side_sockets: Sequence[SideSocket],
        limits: LoanLimits,
        *,
        on_map: OnMap = _register_nothing,
        spare_bytes: int = 0,
        users: Collection[int] | None = None,
        card_lender: CardLender | None = None,
        instance: bytes = _NO_INSTANCE,
        on_lost: Callable[[str], None] = lambda _what: None,
    ) -> None:
        self._users = frozenset({0, os.geteuid()} if users is None else users)
        self._instance = instance
        self._limits = limits
        self._card_lender = card_lender
        # card memory of clients that have disconnected, while their processes still run: how to take it back
        self._borrowings: dict[CardBorrowing, Callable[[], None]] = {}
        self._loans: LoanRegistry[SealedMemory] = LoanRegistry(limits)
        self._memfd_watcher = MemfdWatcher()
        # used by the mapper's thread alone, until that has ended
        self._spare = SpareMemory(
            spare_bytes, lambda size_bytes: SealedMemory(size_bytes, on_map, self._memfd_watcher)
        )
        self._clients: list[_Client] = []
        clients_count = limits.clients_count
        self._shares = FairShares(
            clients_count, clients_count // RESERVED_PART, "clients of shared memory"
        )
        self._is_closing = False
        self._listener = Listener(
            "clients of shared memory", side_sockets, (), self._accept, on_lost
        )
        self._mapper = ThreadPoolExecutor(1, "memory-mapper")
        # This also starts its thread, while there are some left. A first client would wait for as long.
        self._mapper.submit(self._spare.prepare).result()
        self._thread = threading.Thread(target=self._serve, name="memory-lender", daemon=True)
        self._thread.start()

    @property
    def lent_bytes(self) -> int:
        """How many bytes are mapped: lent, or retired and still in use."""
        return self._loans.size_bytes

    @property
    def limit_bytes(self) -> int:
        """How many bytes it lends at most."""
        return self._limits.all_bytes

    @property
    def borrowers_count(self) -> int:
        """How many clients are connected."""
        return self._shares.taken_count

    @property
    def lingering_bytes(self) -> int:
        """How many bytes are no longer mapped here, but still by clients."""
        self._memfd_watcher.poll()
        return self._loans.lingering_bytes

    def use(self, name: str, region: bytes, identity: str = "") -> RegionUse:
        """Use a region of host memory or of a card. It stays mapped until the use ends.

        Args:
            name: Name of the argument whose elements are there, for errors.
            identity: The identity of the call. See `LoanRegistry.use`.

        Raises:
            StaleRegionError: The region is not lent, or is another identity's.
        """
        use = self._loans.use(region, identity)
        if use is None and self._card_lender is not None:
            use = self._card_lender.use(region, identity)
        if use is None:
            raise StaleRegionError(
                f"{name} must be in shared memory that this server lends, and its region is unknown, was "
                f"given back, or was taken back when its client disconnected{WORKERS.hint(region)}",
                argument=name,
            )
        return use

    def withdraw(self) -> None:
        """Accept no more clients, and remove the socket's file, so that a successor can have its path."""
        self._listener.withdraw()

    def close(self) -> None:
        """Withdraw, and take back all memory. What calls still use stays mapped until they end."""
        self._listener.withdraw()
        self._listener.call_soon(self._begin_closing)
        self._thread.join()
        self._mapper.shutdown()
        self._spare.close()
        self._listener.close()  # last: it delivers the replies that the mapper has left
        self._memfd_watcher.close()

    def wait_until_unused(self, timeout_s: float) -> bool:
        """Wait until no region is lent or mapped; return False if that takes longer than `timeout_s`."""
        return self._loans.wait_until_unused(timeout_s)

    # In the lender's thread.

    def _serve(self) -> None:
        self._listener.run()
        self._drop_all()

    def _begin_closing(self) -> None:
        self._is_closing = True
        self._listener.stop()

    def _drop_all(self) -> None:
        for client in tuple(self._clients):
            self._drop(client)
        for finish in tuple(self._borrowings.values()):
            finish()

    def _accept(self, connection: socket.socket, _address: object) -> None:
        connection.setblocking(False)
        client = _Client(
            connection, peer_credentials(connection), peer_key_of_connection(connection, "")
        )
        if client.peer.user not in self._users:
            self._refuse(client, "the server does not lend memory to this user")
            return
        for other in self._clients:  # `take` may preempt the one that made no progress for longest
            other.note_progress()
        try:
            client.place = self._shares.take(client.account.peer, partial(self._drop, client))
        except UnavailableError as error:
            self._refuse(client, str(error))
            return
        client.place.is_idle = True
        try:
            self._listen_to(client)
        except BaseException:
            client.place.free()
            raise
        self._clients.append(client)

    def _refuse(self, client: _Client, reason: str) -> None:
        key = {REPEAT_KEY: (__name__, reason)}
        _log.warning("shared memory is refused to %s: %s", client.peer, reason, extra=key)
        client.send(LendingReply(ReplyStatus.REFUSED, text=reason))
        client.close()

    def _listen_to(self, client: _Client) -> None:
        self._listener.watch(client.connection.fileno(), partial(self._read, client))

    def _read(self, client: _Client) -> None:
        try:
            packet = client.connection.recv(_MAX_PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._drop(client)
            return
        try:
            request = LendingRequest.parse(packet)
        except ValueError as error:
            _log.warning(
                "%s sent a malformed request for shared memory: %s",
                client.peer,
                excerpt(error),
                extra={REPEAT_KEY: (__name__, ReplyStatus.MALFORMED)},
            )
            client.send(LendingReply(ReplyStatus.MALFORMED, text=str(error)))
            self._drop(client)
            return
        if request.operation is LendingOperation.IDENTIFY:
            if not client.send(LendingReply(ReplyStatus.DONE, region=self._instance)):
                self._drop(client)
            return
        client.place.note_progress()
        self._stop_reading(client)  # one request at a time: `_deliver` starts reading again
        try:
            self._mapper.submit(self._perform, client, request)
        except MemoryError:  # the request is lost: its client must not wait for the reply
            self._drop(client)
            raise

    def _stop_reading(self, client: _Client) -> None:
        self._listener.unwatch(client.connection.fileno())

    def _deliver(self, client: _Client, reply: LendingReply, memory: SealedMemory | None) -> None:
        descriptors = () if memory is None else (memory.descriptor,)
        if client.account.is_open:
            self._listen_to(client)
            if not client.send(reply, descriptors):
                self._drop(client)
        else:  # it was dropped while the mapper may have lent it its first region on a card
            self._release_card_loans(client)
        if reply.status is ReplyStatus.DONE:
            client.place.is_idle = False
        if memory is not None:
            memory.close_descriptor()

    def _drop(self, client: _Client) -> None:
        # first: if it meets a shortage, `_drop` is called again, and nothing else here may be done twice
        self._mapper.submit(_log_failure, partial(self._loans.close, client.account))
        self._stop_reading(client)
        client.close()
        self._clients.remove(client)
        client.place.free()
        client.account.is_open = False  # at once, for `_deliver`: the mapper may close it later
        self._release_card_loans(client)

    def _release_card_loans(self, client: _Client) -> None:
        """Take back the card memory of a client that has disconnected: when its process ends, or now if it has none."""
        borrowing, client.borrowing = client.borrowing, None
        if borrowing is None or self._card_lender is None:
            return
        if self._is_closing:  # the mapper may have been shut down
            self._card_lender.close(borrowing)
            return
        finish = partial(self._finish_release, borrowing, self._card_lender)
        self._borrowings[borrowing] = finish
        if borrowing.is_empty:
            finish()
        else:  # as an action of its own, which is run again if it meets a shortage: what led here is not
            self._listener.call_soon(partial(self._watch_process, borrowing))

    def _watch_process(self, borrowing: CardBorrowing) -> None:
        finish = self._borrowings.get(borrowing)
        if finish is not None:  # or the lender has closed meanwhile
            self._listener.watch(borrowing.process_descriptor, finish)

    def _finish_release(self, borrowing: CardBorrowing, card_lender: CardLender) -> None:
        # first, as in `_drop`
        self._mapper.submit(_log_failure, partial(card_lender.close, borrowing))
        self._listener.unwatch(borrowing.process_descriptor)
        del self._borrowings[borrowing]

    # In the mapper's thread.

    def _perform(self, client: _Client, request: LendingRequest) -> None:
        try:
            reply, memory = self._answer(client, request)
        except Exception:  # noqa: BLE001 - logged, and answered: else the client would wait, and keep its place, for ever
            _log.exception("a request for shared memory failed: unforeseen error")
            text = "the server failed by an unforeseen error: see its log"
            reply, memory = LendingReply(ReplyStatus.FAILED, text=text), None
        self._listener.call_soon(partial(self._deliver, client, reply, memory))
        self._spare.prepare()

    def _answer(
        self, client: _Client, request: LendingRequest
    ) -> tuple[LendingReply, SealedMemory | None]:
        memory: SealedMemory | None = None
        if request.operation is LendingOperation.LEND:
            reply, memory = self._lend(client, request.size_bytes)
        elif request.operation is LendingOperation.LEND_ON_CARD:
            reply = self._lend_on_card(client, request)
        elif self._take_back(client, request.region):
            reply = LendingReply(ReplyStatus.DONE, region=request.region)
        else:
            reply = LendingReply(
                ReplyStatus.MALFORMED, text="this client has no region of that name"
            )
        return reply, memory

    def _lend_on_card(self, client: _Client, request: LendingRequest) -> LendingReply:
        if self._card_lender is None:
            return LendingReply(ReplyStatus.NO_SUCH_CARD, text="the server computes on no card")
        borrowing = client.borrowing
        if borrowing is None:
            try:
                borrowing = client.borrowing = CardBorrowing(
                    client.peer.process, client.account.peer
                )
            except OSError as error:
                text = f"the server cannot see the client's process: {error.strerror or error}"
                return LendingReply(ReplyStatus.NO_SUCH_CARD, text=text)
        return self._card_lender.lend(borrowing, request)

    def _take_back(self, client: _Client, region: bytes) -> bool:
        if self._loans.take_back(client.account, region):
            return True
        borrowing, card_lender = client.borrowing, self._card_lender
        return (
            borrowing is not None
            and card_lender is not None
            and card_lender.take_back(borrowing, region)
        )

    def _lend(
        self, client: _Client, requested_bytes: int
    ) -> tuple[LendingReply, SealedMemory | None]:
        size_bytes = -(-max(requested_bytes, 1) // _PAGE_BYTES) * _PAGE_BYTES
        self._memfd_watcher.poll()
        try:
            self._loans.reserve(client.account, size_bytes)
        except OverLimitError as error:
            key = {REPEAT_KEY: (__name__, error.status)}
            _log.info("%s gets no more shared memory: %s", client.peer, error, extra=key)
            return LendingReply(error.status, text=str(error)), None
        try:
            memory = self._spare.take(size_bytes)
        except Exception:  # noqa: BLE001 - logged, and answered as a failure
            _log.exception("allocating %d bytes of shared memory failed", size_bytes)
            self._loans.cancel_reservation(client.account, size_bytes)
            text = f"the server could not allocate {size_bytes} bytes: see its log"
            return LendingReply(ReplyStatus.FAILED, text=text), None
        name = self._loans.lend(client.account, memory)
        return LendingReply(ReplyStatus.DONE, size_bytes, name), memory


def _log_failure(work: Callable[[], None]) -> None:
    """Do what nobody waits for in the mapper's thread: an error would be lost with its future."""
    try:
        work()
    except Exception:  # noqa: BLE001 - logged: the memory of other clients is taken back all the same
        _log.exception("taking back shared memory failed: unforeseen error")


class _Client:
    """One connection to the lender's socket.

    Attributes:
        place: Its place among all clients, once it has one. The place is idle until the client first borrows.
        borrowing: Its card memory; None if it never asked for any.
    """

    place: PeerPlace

    def __init__(self, connection: socket.socket, peer: PeerCredentials, peer_key: str) -> None:
        self.connection = connection
        self.peer = peer
        self.account = BorrowerAccount(peer=peer_key)
        self.borrowing: CardBorrowing | None = None

    def note_progress(self) -> None:
        """Tell its place when it last asked for something, or when a call last used its memory."""
        used_s = self.account.used_s
        if self.borrowing is not None:
            used_s = max(used_s, self.borrowing.account.used_s)
        self.place.progressed_s = max(self.place.progressed_s, used_s)

    def send(self, reply: LendingReply, descriptors: tuple[int, ...] = ()) -> bool:
        """Send a reply; return False if the client has gone, or does not read."""
        try:
            socket.send_fds(self.connection, [reply.pack()], descriptors)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close the connection so that the client can read the last reply.

        Unread packets are read first: if the socket were closed with some left, the client would get
        ECONNRESET instead of the reply.
        """
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)
            while self.connection.recv(_MAX_PACKET_BYTES):
                pass
        self.connection.close()
