"""Calls that use kept tensors, and the end of those that wait for their clients while others are due the memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from deconvd.errors import UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.residents.entry import RETRY_AFTER_S, ResidentEntry

__all__ = ["ResidentUse", "ResidentUses"]

_STALLED_S: Final = 0.5
"""How long a call may wait for its client to send or to take anything, while its tensors are in the way of a share."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class ResidentUse:
    """A call, and the kept tensors that it uses."""

    call: CallContext
    tensors: list[ResidentEntry] = field(default_factory=list)


class ResidentUses:
    """The calls that use kept tensors now. Thread-safe."""

    def __init__(self) -> None:
        self._uses: dict[ResidentUse, None] = {}  # each operation on it is atomic

    def begin(self, call: CallContext) -> ResidentUse:
        """Return the use of a call, without tensors yet."""
        use = ResidentUse(call)
        self._uses[use] = None
        return use

    def end(self, use: ResidentUse) -> None:
        """Forget a use: its tensors are released."""
        self._uses.pop(use, None)

    def stop_stalled(self, is_in_the_way: Callable[[ResidentEntry], bool]) -> None:
        """Stop, without a lock, the calls that wait for their clients and use tensors that are in the way."""
        then_s = time.monotonic() - _STALLED_S
        for use in tuple(self._uses):
            if use.call.client_wait.blocked_since_s <= then_s and any(
                map(is_in_the_way, use.tensors)
            ):
                _log.info("a call of %s gives way: its client is waited for", use.call.peer)
                use.call.stop(
                    UnavailableError(
                        "the call used tensors that had to make room for what another tenant may keep, "
                        f"and its client neither sent nor took anything for {_STALLED_S} s",
                        retry_after_s=RETRY_AFTER_S,
                    )
                )
                use.call.close_stream()
