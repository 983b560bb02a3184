"""Messages that are still arriving by gRPC, which holds what has come of them: a watch over that memory.

gRPC tells of a message only once it is whole, so nobody can say what one of them has, and no budget can count it. But
all of them together can be measured: what the process has allocated beyond what budgets count and what it had at rest.
Beyond a bound, some of the calls that have them end. Up to it none waits for another, and small ones never do.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Final

from deconvd.errors import UnavailableError
from deconvd.malloc import allocated_bytes
from deconvd.status import status_from_error
from deconvd_server.peers import counted_by_grpc
from deconvd_server.rpc import Later, Rpc

__all__ = ["Receipts"]

_LOOK_S: Final = 0.2
"""How often it is looked, while there is so much room that it cannot be filled meanwhile."""

_SOONEST_S: Final = 0.005
"""How soon it is looked again when there is hardly any."""

_FREED_S: Final = 0.02
"""How long gRPC is given to free what the calls had that were ended."""

_FASTEST_BYTES_PER_S: Final = 2e9
"""How fast messages may come: gRPC takes less than that from all connections, on two processors."""

_TOLD_S: Final = 0.2
"""How long a client has to take the status that its call ends with. What has come of its message is freed then."""

_log = logging.getLogger(__name__)


class Receipts:
    """Ends calls whose messages are still arriving when gRPC holds too much of such. All in gRPC's thread.

    The peer gives way that has kept it waiting for longest, over all its calls: of these the older half end. Sessions,
    which are idle for most of their time, are the last to. So who sends little, or in little time, is hardly ever
    meant, and a peer that begins many messages and ends none is.

    Args:
        rpcs: All calls that there are.
        bound_bytes: What messages may take that are not admitted yet.
        later: Has it look again.
    """

    def __init__(self, rpcs: Collection[Rpc], bound_bytes: int, later: Later) -> None:
        self._rpcs = rpcs
        self._bound_bytes = bound_bytes
        self._later = later
        self._counted_bytes: Callable[[], int] = lambda: 0
        self._rest_bytes = math.inf

    def count_with(self, counted_bytes: Callable[[], int]) -> None:
        """Have it know from now on what budgets count of its memory, and that it is at rest."""
        self._counted_bytes = counted_bytes
        self._rest_bytes = math.inf

    def look(self) -> None:
        """End calls if there is too much, now and from now on."""
        beside_bytes = allocated_bytes() - self._counted_bytes()
        self._rest_bytes = min(self._rest_bytes, beside_bytes)
        room_bytes = self._rest_bytes + self._bound_bytes - beside_bytes
        if room_bytes < 0 and not self._end_some():
            # it is no message's, whatever it is
            self._rest_bytes = beside_bytes - self._bound_bytes / 2
        wait_s = _FREED_S if room_bytes < 0 else room_bytes / _FASTEST_BYTES_PER_S
        self._later(min(max(wait_s, _SOONEST_S), _LOOK_S), self.look)

    def _end_some(self) -> bool:
        """End some calls, and return whether there were any to end."""
        waiting = [rpc for rpc in list(self._rpcs) if rpc.receives_since_s < math.inf]
        brief = [rpc for rpc in waiting if not rpc.is_idle]
        peer, leavers = _longest_waited_for(brief or waiting)
        if leavers:
            _log.warning(
                "%d calls of %s end: messages that are still arriving take more than %d bytes",
                *(len(leavers), peer, self._bound_bytes),
            )
        failure = status_from_error(
            UnavailableError(
                "the server has no memory for this call's message beside others that are still "
                f"arriving: together they may take {self._bound_bytes} bytes",
                retry_after_s=0.5,
            )
        )
        for rpc in leavers:
            rpc.receives_since_s = math.inf
            rpc.fail(failure)
            self._later(_TOLD_S, rpc.cancel)
        return bool(leavers)


def _longest_waited_for(rpcs: Sequence[Rpc]) -> tuple[str, list[Rpc]]:
    """Return the peer whose messages are waited for for longest, and the older half of its calls."""
    by_peer: dict[str, list[Rpc]] = defaultdict(list)
    for rpc in rpcs:
        by_peer[counted_by_grpc(rpc.peer)].append(rpc)
    now_s = time.monotonic()
    peer = max(
        by_peer,
        key=lambda one: sum(now_s - rpc.receives_since_s for rpc in by_peer[one]),
        default="",
    )
    own = sorted(by_peer[peer], key=lambda rpc: rpc.receives_since_s)
    return peer, own[: (len(own) + 1) // 2]
