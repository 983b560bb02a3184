"""Lends memory of a card to clients whose tensors are on the same card, by CUDA's interprocess handles."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from deconvd.errors import DeconvdError, ExhaustedError
from deconvd.lending.protocol import LendingReply, LendingRequest, ReplyStatus
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_server.device import DeviceTensor, LentMemory
from deconvd_server.shared_memory.loans import (
    BorrowerAccount,
    LoanLimits,
    LoanRegistry,
    OverLimitError,
    RegionUse,
)

__all__ = ["CardBorrowing", "CardLender"]

_GRANULARITY_BYTES: Final = 2 << 20
"""CUDA may cut a smaller block from a larger one, and whoever opens the handle would see the whole larger block."""

_log = logging.getLogger(__name__)


class LendingEngine(Protocol):
    """An engine whose device is a card."""

    def lend(self, size_bytes: int) -> LentMemory:
        """Return new memory. See `Engine.lend`."""

    def take_back(self, lent: LentMemory) -> None:
        """Free it. See `Engine.take_back`."""


class _CardMemory:
    """Lent memory of a card, as `Lendable`."""

    def __init__(self, engine: LendingEngine, lent: LentMemory) -> None:
        self.lent = lent
        self.size_bytes = lent.size_bytes
        self._engine = engine

    def tensor(
        self, name: str, spec: TensorSpec, location: SharedSlice, *, is_writable: bool
    ) -> DeviceTensor:
        """Return a part of it as a tensor. See `Lendable` and `LentMemory`."""
        location.check(name, spec, self.size_bytes)
        return self.lent.tensor(spec, location.offset_bytes)

    def unmap(self) -> None:
        """Give it back to the card."""
        self._engine.take_back(self.lent)

    def on_gone(self, then: Callable[[], None]) -> None:
        """Call `then` now: CUDA does not tell whether another process still has the memory open."""
        then()


class CardBorrowing:
    """The card memory of one client, from its first region on.

    CUDA requires that memory is freed only after every other process has closed it, and a client may
    have it open after it has closed its socket. So the client's process is watched.

    Args:
        process: Id of the client's process.
        peer_key: Key of the peer that the client belongs to. See `deconvd_server.resources.peer_identity`.

    Raises:
        OSError: No such process can be seen from here.

    Attributes:
        process_descriptor: A descriptor that is readable once the process has ended.
    """

    def __init__(self, process: int, peer_key: str) -> None:
        self.account = BorrowerAccount(peer=peer_key)
        self.process_descriptor = os.pidfd_open(process)

    @property
    def is_empty(self) -> bool:
        """Whether the client has no regions."""
        return self.account.usage.regions_count == 0

    def close(self) -> None:
        """Stop watching the process."""
        os.close(self.process_descriptor)


class CardLender:
    """Lends memory of cards. Thread-safe.

    Args:
        engines: The engines of the cards, by `card_id`.
        limits: How much is lent on all cards together. Lent memory also counts against the engine's budget.
    """

    def __init__(self, engines: Mapping[bytes, LendingEngine], limits: LoanLimits) -> None:
        self._engines = engines
        self._loans: LoanRegistry[_CardMemory] = LoanRegistry(limits)

    @property
    def lent_bytes(self) -> int:
        """How many bytes are lent, or retired and still in use."""
        return self._loans.size_bytes

    def lend(self, borrowing: CardBorrowing, request: LendingRequest) -> LendingReply:
        """Answer a request of LEND_ON_CARD."""
        engine = self._engines.get(request.region)
        if engine is None:
            return LendingReply(
                ReplyStatus.NO_SUCH_CARD, text="the server does not compute on that card"
            )
        size_bytes = -(-max(request.size_bytes, 1) // _GRANULARITY_BYTES) * _GRANULARITY_BYTES
        try:
            self._loans.reserve(borrowing.account, size_bytes)
        except OverLimitError as error:
            return LendingReply(error.status, text=str(error))
        try:
            lent = engine.lend(size_bytes)
        except DeconvdError as error:
            self._loans.cancel_reservation(borrowing.account, size_bytes)
            is_full = isinstance(error, ExhaustedError)
            return LendingReply(
                ReplyStatus.OVER_SERVER_LIMIT if is_full else ReplyStatus.FAILED, text=str(error)
            )
        except Exception:  # noqa: BLE001 - logged, and answered as a failure
            _log.exception("lending %d bytes of a card failed", size_bytes)
            self._loans.cancel_reservation(borrowing.account, size_bytes)
            text = f"the server could not allocate {size_bytes} bytes on the card: see its log"
            return LendingReply(ReplyStatus.FAILED, text=text)
        name = self._loans.lend(borrowing.account, _CardMemory(engine, lent))
        return LendingReply(ReplyStatus.DONE, size_bytes, name, lent.handle.hex())

    def take_back(self, borrowing: CardBorrowing, name: bytes) -> bool:
        """Retire a region of a client; return False if the client has none of that name."""
        return self._loans.take_back(borrowing.account, name)

    def close(self, borrowing: CardBorrowing) -> None:
        """Retire all regions of a client: its process has ended, or the server is closing."""
        borrowing.close()
        self._loans.close(borrowing.account)

    def use(self, name: bytes, identity: str = "") -> RegionUse | None:
        """Use a region; return None if no region of that name is lent for calls of that identity."""
        return self._loans.use(name, identity)
