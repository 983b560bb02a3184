"""Which calls use which resident tensors, to stop calls that wait for their clients while others need the memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from deconvd.errors import UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.residents.entry import RETRY_AFTER_S, ResidentEntry

__all__ = ["ResidentUse", "ResidentUses"]

_STALLED_S: Final = 0.5
"""How long a call that keeps another tenant from its share may wait for its client to send or take data."""

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class ResidentUse:
    """A call and the resident tensors that it uses. Its thread alone appends to `tensors`."""

    call: CallContext
    tensors: list[ResidentEntry] = field(default_factory=list)


class ResidentUses:
    """All calls that use resident tensors now. Thread-safe."""

    def __init__(self) -> None:
        self._uses: dict[ResidentUse, None] = {}  # no lock: operations on a dict are atomic

    def begin(self, call: CallContext) -> ResidentUse:
        """Return a use for a call, with no tensors yet."""
        use = ResidentUse(call)
        self._uses[use] = None
        return use

    def end(self, use: ResidentUse) -> None:
        """Forget a use. The caller releases its tensors."""
        self._uses.pop(use, None)

    def stop_stalled(self, blocks_share: Callable[[ResidentEntry], bool]) -> None:
        """Stop each call that waits for its client and uses a tensor for which `blocks_share` is true.

        The caller must hold no lock, since stopping a call runs its callbacks. So an answer of `blocks_share` may be
        out of date: then a stalled call is stopped a moment too soon or too late.
        """
        then_s = time.monotonic() - _STALLED_S
        for use in tuple(self._uses):
            if use.call.client_wait.blocked_since_s <= then_s and any(
                map(blocks_share, use.tensors)
            ):
                _log.info(
                    "stopping a call of %s: its client is stalled, and another tenant needs the memory",
                    use.call.peer,
                    extra={REPEAT_KEY: __name__},
                )
                use.call.stop(
                    UnavailableError(
                        "the call was stopped: its tensors had to make room for another tenant within "
                        f"that tenant's share, and its client neither sent nor received data for {_STALLED_S} s",
                        retry_after_s=RETRY_AFTER_S,
                    )
                )
                use.call.close_stream()
