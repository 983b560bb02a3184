"""Lends memory of cards, for clients whose tensors lie on the same card."""

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
"""CUDA may cut what is not a multiple of it from a larger block, all of which whoever opens it would see."""

_log = logging.getLogger(__name__)


class LendingEngine(Protocol):
    """An engine whose device is a card."""

    def lend(self, size_bytes: int) -> LentMemory:
        """Return new memory. See `Engine.lend`."""

    def take_back(self, lent: LentMemory) -> None:
        """Free it. See `Engine.take_back`."""


class _CardMemory:
    """Lent memory of a card, as `Loans` has it."""

    def __init__(self, engine: LendingEngine, lent: LentMemory) -> None:
        self.lent = lent
        self.size_bytes = lent.size_bytes
        self._engine = engine

    def tensor(
        self, name: str, spec: TensorSpec, lies_at: SharedSlice, *, is_writable: bool
    ) -> DeviceTensor:
        """Return a part of it as a tensor. See `Lendable` and `LentMemory`."""
        lies_at.check(name, spec, self.size_bytes)
        return self.lent.tensor(spec, lies_at.offset_bytes)

    def unmap(self) -> None:
        """Give it back to the card."""
        self._engine.take_back(self.lent)

    def on_gone(self, then: Callable[[], None]) -> None:
        """Call `then` now: whether another process has it open still, CUDA does not tell."""
        then()


class CardBorrowing:
    """What one client has on cards, from its first region there.

    CUDA has memory freed only once nobody else has it open, and a client that closes its socket may
    have it open still: its process is watched then.

    Args:
        process: Id of the client's process.
        counted_by: By what the client is counted. See `deconvd_server.resources.peer_keys`.

    Raises:
        OSError: There is no such process, as far as can be seen here.

    Attributes:
        process_descriptor: A descriptor that is readable once the process has ended.
    """

    def __init__(self, process: int, counted_by: str) -> None:
        self.account = BorrowerAccount(peer=counted_by)
        self.process_descriptor = os.pidfd_open(process)

    @property
    def is_empty(self) -> bool:
        """Whether the client has nothing."""
        return self.account.usage.regions_count == 0

    def close(self) -> None:
        """Watch the process no more."""
        os.close(self.process_descriptor)


class CardLender:
    """Memory of cards that is lent. Thread-safe.

    Args:
        engines: By the `card_id`s of their cards.
        limits: How much is lent, on all cards together; what is lent takes of the engine's budget.
    """

    def __init__(self, engines: Mapping[bytes, LendingEngine], limits: LoanLimits) -> None:
        self._engines = engines
        self._loans: LoanRegistry[_CardMemory] = LoanRegistry(limits)

    @property
    def lent_bytes(self) -> int:
        """What is lent, or retired and still in use, now."""
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
            return LendingReply(error.answer, text=str(error))
        try:
            lent = engine.lend(size_bytes)
        except DeconvdError as error:
            self._loans.cancel_reservation(borrowing.account, size_bytes)
            is_full = isinstance(error, ExhaustedError)
            return LendingReply(
                ReplyStatus.OVER_SERVER_LIMIT if is_full else ReplyStatus.FAILED, text=str(error)
            )
        except Exception:  # noqa: BLE001 - logged, and answered as a failure
            _log.exception("%d bytes of a card could not be lent", size_bytes)
            self._loans.cancel_reservation(borrowing.account, size_bytes)
            return LendingReply(
                ReplyStatus.FAILED, text="the server could not get the memory: see its log"
            )
        name = self._loans.lend(borrowing.account, _CardMemory(engine, lent))
        return LendingReply(ReplyStatus.DONE, size_bytes, name, lent.handle.hex())

    def take_back(self, borrowing: CardBorrowing, name: bytes) -> bool:
        """Retire a region of a client; return False if it has none of that name."""
        return self._loans.take_back(borrowing.account, name)

    def close(self, borrowing: CardBorrowing) -> None:
        """Retire all that a client has. Its process has ended, or the server is about to."""
        borrowing.close()
        self._loans.close(borrowing.account)

    def use(self, name: bytes) -> RegionUse | None:
        """Use a region; None if none of that name is lent."""
        return self._loans.use(name)
