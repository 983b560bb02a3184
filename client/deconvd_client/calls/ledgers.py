"""Where the time of calls went: the last ledger of each thread, and those that a block of code collects."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from deconvd.wire.ledger import parse_ledger

__all__ = ["CallLedger", "LedgerRecorder"]

_UNIT: Final = "_us"
_TOTAL: Final = "server"


@dataclass(frozen=True, slots=True)
class CallLedger:
    """Where the time of one call to the server went, in milliseconds. `Connection.ledgers` collects them.

    Attributes:
        call: Name of the RPC: ``Deconvolve``, ``DeconvolveGrad``, ``PutTensor`` or ``GetTensor``.
        total_ms: Time in the client from the first attempt to send the call until its results were there.
        server_ms: Time on the server, from the arrival of the request to the end of the response. 0 if the server
            sent no ledger. The rest of `total_ms` is the network, the client, and pauses before retries.
        stages_ms: Time of each stage on the server: ``queue``, ``follow``, ``upload``, ``compute`` and ``download``,
            as in `Connection.last_ledger`. Stages that do not apply are missing. The stages of a large call overlap.
    """

    call: str
    total_ms: float
    server_ms: float
    stages_ms: Mapping[str, float]

    def __str__(self) -> str:
        stages = [
            f"{name} {ms:.2f}" for name, ms in (*self.stages_ms.items(), (_TOTAL, self.server_ms))
        ]
        return f"{self.call} {self.total_ms:.2f} ms: {', '.join(stages)}"


class LedgerRecorder:
    """Keeps the last ledger of each thread, and adds ledgers to the lists of blocks that collect them. Thread-safe.

    Attributes:
        last: Its ``text`` is the ledger of the thread's last call.
        lists: The lists of the blocks around a call. Empty if nobody collects.
    """

    def __init__(self) -> None:
        self.last: threading.local = threading.local()
        self.lists: ContextVar[tuple[list[CallLedger], ...]] = ContextVar("ledgers", default=())

    def record(self, call: str, text: str, start_s: float) -> None:
        """Record a call that has ended now.

        Args:
            call: Name of its RPC.
            text: In the format of `deconvd.wire.ledger`.
            start_s: When it began, by `time.perf_counter`.
        """
        self.last.text = text
        lists = self.lists.get()
        if lists:
            ledger = _parse_call_ledger(call, text, time.perf_counter() - start_s)
            for ledgers in lists:
                ledgers.append(ledger)

    @property
    def last_text(self) -> str:
        """The ledger of this thread's last call, as text; empty before the first one."""
        text: str = getattr(self.last, "text", "")
        return text

    def forget_last(self) -> None:
        """Forget the ledger of this thread's last call."""
        self.last.text = ""

    @contextmanager
    def collect(self) -> Iterator[list[CallLedger]]:
        """Collect the ledgers of the calls in a ``with`` block. See `Connection.ledgers`."""
        ledgers: list[CallLedger] = []
        token = self.lists.set((*self.lists.get(), ledgers))
        try:
            yield ledgers
        finally:
            self.lists.reset(token)


def _parse_call_ledger(call: str, text: str, total_s: float) -> CallLedger:
    stages = {name.removesuffix(_UNIT): us / 1e3 for name, us in parse_ledger(text).items()}
    server_ms = stages.pop(_TOTAL, 0.0)
    return CallLedger(call, total_s * 1e3, server_ms, stages)
