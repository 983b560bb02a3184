"""The striped calls of a server, by the ids of their transfers: there a call and its stripes find each other.

A peer's transfers are unknown to other peers. A stripe that names one of those waits for a call of its own peer, as it
does with an id that nobody has used.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from deconvd.direct.connection_errors import RemoteProtocolError
from deconvd.direct.events import MAX_STRIPES_COUNT
from deconvd.host.machine import processors_count
from deconvd_server.call.context import CallContext
from deconvd_server.resources.capabilities import CapabilityTable
from deconvd_server.transports.direct.striped_transfer import (
    STRIPE_WAIT_S,
    StripedTransfer,
    StripeMember,
)

__all__ = ["TransferTable"]

_ENDED_COUNT: Final = 256
"""How many ids of ended transfers are remembered: their late stripes are refused at once, and they are not used again.
"""

_PROCESSORS_PER_STRIPE: Final = 2
"""A stripe has a thread here, and its elements are copied to and from the device meanwhile."""

_MIN_STRIPES_COUNT: Final = 2


class TransferTable:
    """The transfers of the server's striped calls. Thread-safe.

    Locks: it holds its own while it takes that of a transfer, never the other way round.

    Args:
        on_complete: Called, once `withdraw` has been called, whenever a call has got all its stripes or has ended.
    """

    def __init__(self, on_complete: Callable[[], None]) -> None:
        self._on_complete = on_complete
        self._changed = threading.Condition()
        self._transfers: CapabilityTable[StripedTransfer] = CapabilityTable()
        self._ended: deque[tuple[bytes, str]] = deque()
        self._is_withdrawn = False
        self._calls_count = 0
        self._most_stripes_count = processors_count() // _PROCESSORS_PER_STRIPE

    @property
    def stripes_limit(self) -> int:
        """How many stripes a call should have at most, so that the threads of those of now share the processors."""
        share = self._most_stripes_count // max(self._calls_count, 1)
        return min(max(share, _MIN_STRIPES_COUNT), MAX_STRIPES_COUNT)

    @contextmanager
    def open(
        self, transfer_id: bytes, peer_key: str, stripes_count: int, call: CallContext
    ) -> Iterator[StripedTransfer]:
        """Let the stripes of a call join its transfer, which is the block's value. The block's end ends it.

        Raises:
            RemoteProtocolError: The id was used before, or the server takes no more calls.
        """
        with self._changed:
            transfer = None if self._is_withdrawn else self._find(transfer_id, peer_key)
            is_open = transfer is not None and transfer.open(call, stripes_count)
            self._calls_count += is_open
        if transfer is None or not is_open:
            raise RemoteProtocolError("a striped call needs a new id for its transfer")
        self._note_change()
        try:
            yield transfer
        finally:
            transfer.end()
            with self._changed:
                self._calls_count -= 1
            self._forget_later(transfer_id, peer_key)
            self._note_change()

    def join(self, transfer_id: bytes, peer_key: str, member: StripeMember) -> StripedTransfer:
        """Let a stripe join the transfer of its call, which may come later. End it by `leave`.

        Raises:
            RemoteProtocolError: The call has all its stripes, or has ended.
        """
        with self._changed:
            transfer = self._find(transfer_id, peer_key)
            is_member = transfer is not None and transfer.add(member)
        if transfer is None or not is_member:
            raise RemoteProtocolError("a stripe has no call that takes it")
        self._note_change()
        return transfer

    def leave(self, transfer_id: bytes, transfer: StripedTransfer, member: StripeMember) -> None:
        """Remove a stripe. May be called again."""
        with self._changed:
            owner = transfer.peer_key
            if transfer.remove(member) and self._transfers.get(transfer_id, owner) is transfer:
                self._transfers.pop(transfer_id, owner)

    def peers_to_come(self) -> set[str]:
        """Return the peers whose calls lack stripes: idle connections of theirs may be about to become such."""
        with self._changed:
            return {t.peer_key for t in self._transfers.values() if t.lacks_stripes}

    def withdraw(self) -> None:
        """Take no more calls, and let no stripe wait for its call any longer."""
        with self._changed:
            self._is_withdrawn = True
            for transfer in self._transfers.values():
                transfer.expire()

    def wait_until_complete(self, timeout_s: float) -> None:
        """Wait until no call lacks stripes, or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: not self.peers_to_come(), min(timeout_s, STRIPE_WAIT_S))

    def _find(self, transfer_id: bytes, peer_key: str) -> StripedTransfer | None:
        """Return a peer's transfer of an id; a new one if the id is new. None if the server takes no more calls."""
        with self._changed:
            transfer = self._transfers.get(transfer_id, peer_key)
            if transfer is None and not self._is_withdrawn:
                transfer = StripedTransfer(peer_key)
                self._transfers.put(transfer_id, transfer, peer_key)
            return transfer

    def _forget_later(self, transfer_id: bytes, peer_key: str) -> None:
        with self._changed:
            self._ended.append((transfer_id, peer_key))
            if len(self._ended) > _ENDED_COUNT:
                self._transfers.pop(*self._ended.popleft())

    def _note_change(self) -> None:
        with self._changed:
            self._changed.notify_all()
            is_withdrawn = self._is_withdrawn
        if is_withdrawn:
            self._on_complete()
