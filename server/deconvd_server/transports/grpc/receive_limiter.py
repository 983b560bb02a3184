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
from functools import partial
from typing import Final

from deconvd.errors import UnavailableError
from deconvd.host.malloc import allocated_bytes
from deconvd.wire.status import status_from_error
from deconvd_server.resources.peer_keys import peer_key_of_grpc
from deconvd_server.transports.grpc.rpc import CallLater, Rpc

__all__ = ["ReceiveLimiter"]

_POLL_PERIOD_S: Final = 0.2
"""How often it is looked, while there is so much room that it cannot be filled meanwhile."""

_IDLE_CHECKS_COUNT: Final = 4
"""Checks without a measurement between two with one, as long as there is no call by gRPC: nothing arrives then, and
what the process has at rest changes slowly."""

_LEAST_POLL_PERIOD_S: Final = 0.005
"""How soon it is looked again when there is hardly any."""

_FREE_S: Final = 0.04
"""How long gRPC is given to free what the calls had that were ended."""

_FASTEST_BYTES_PER_S: Final = 2e9
"""How fast messages may come: gRPC takes less than that from all connections, on two processors."""

_END_OF_STREAM_S: Final = 0.01
"""How long gRPC is given to tell of a call that no more messages come."""

_LONGEST_COUNTED_S: Final = 1.0
"""A message that is awaited for longer counts no more than others: it may be a large one on a slow network."""

_RETRY_AFTER_S: Final = 0.5

_STATUS_SEND_S: Final = 0.02
"""How long gRPC has to send the status that a call ends with. What has come of its message is freed then, at latest."""

_log = logging.getLogger(__name__)


class ReceiveLimiter:
    """Ends calls whose messages are still arriving when gRPC holds too much of such. All in gRPC's thread.

    The peer gives way that has kept it waiting for longest, over all its calls: of these the older half end. So who
    sends little, or in little time, is hardly ever meant, and a peer that begins many messages and ends none is.
    Streams that have more than they are asked for go if there is none of those, and at last sessions, which are idle
    for most of their time.

    Args:
        rpcs: All calls that there are.
        bound_bytes: What messages may take that are not admitted yet.
        later: Has it look again.
        catch_up: Takes the messages that have come whole already.
    """

    def __init__(
        self,
        rpcs: Collection[Rpc],
        bound_bytes: int,
        later: CallLater,
        catch_up: Callable[[], None],
    ) -> None:
        self._rpcs = rpcs
        self._bound_bytes = bound_bytes
        self._call_later = later
        self._catch_up = catch_up
        self._budgeted_bytes: Callable[[], int] = lambda: 0
        self._pooled_bytes = 0
        self._rest_bytes = math.inf
        self._skipped_count = _IDLE_CHECKS_COUNT  # the first check measures

    def set_accounting(self, counted_bytes: Callable[[], int], kept_bytes: int) -> None:
        """Have it know from now on what budgets count of its memory, and that it is at rest.

        Args:
            kept_bytes: What it may come to keep beside.
        """
        self._budgeted_bytes = counted_bytes
        self._pooled_bytes = kept_bytes
        self._rest_bytes = math.inf
        self._skipped_count = _IDLE_CHECKS_COUNT

    def check(self) -> None:
        """End calls if messages take too much memory; check again by itself from now on."""
        self._skipped_count += 1
        if not self._rpcs and self._skipped_count <= _IDLE_CHECKS_COUNT:
            self._call_later(_POLL_PERIOD_S, self.check)
            return
        self._skipped_count = 0
        wait_s = _FREE_S
        try:
            room_bytes = self._room_bytes()
            if room_bytes > 0:
                wait_s = min(
                    max(room_bytes / _FASTEST_BYTES_PER_S, _LEAST_POLL_PERIOD_S), _POLL_PERIOD_S
                )
            else:
                self._make_room()
        finally:  # memory may run out meanwhile
            self._call_later(wait_s, self.check)

    def _room_bytes(self) -> float:
        """Return what messages may still take; less than nothing if they take too much."""
        beside_bytes = allocated_bytes() - self._budgeted_bytes()
        self._rest_bytes = min(self._rest_bytes, beside_bytes)
        return self._rest_bytes + self._pooled_bytes + self._bound_bytes - beside_bytes

    def _make_room(self) -> None:
        """End some calls. If there are none, the memory is no message's, whatever it is."""
        self._probe_completed()
        self._catch_up()
        peer, leavers = _slowest_peer(self._preemptible())
        if not leavers:
            self._rest_bytes -= self._room_bytes() - self._bound_bytes / 2
            return
        _log.warning(
            "%d calls of %s end: messages that are not admitted yet take more than %d bytes",
            *(len(leavers), peer, self._bound_bytes),
        )
        error = UnavailableError(
            "the server has no memory for the call's messages beside others that are not admitted yet: "
            f"together they may take {self._bound_bytes} bytes",
            retry_after_s=_RETRY_AFTER_S,
        )
        failure = status_from_error(error)
        for rpc in leavers:
            rpc.fail(failure)
            self._call_later(_STATUS_SEND_S, rpc.cancel)

    def _probe_completed(self) -> None:
        """Ask for more where none is to come: honest clients say at once that there is none."""
        for rpc in list(self._rpcs):
            if rpc.has_all_requests and not rpc.is_receiving:
                rpc.receive(partial(_cancel_oversent, rpc))

    def _preemptible(self) -> list[Rpc]:
        """Return the calls of which some are to end: those of the first kind that there are any of."""
        calls = [rpc for rpc in list(self._rpcs) if not rpc.has_ended]
        receiving = [rpc for rpc in calls if rpc.is_receiving]
        asked_until_s = time.monotonic() - _END_OF_STREAM_S
        brief = [
            rpc
            for rpc in receiving
            if not rpc.is_idle
            and not (rpc.has_all_requests and rpc.receive_began_s > asked_until_s)
        ]
        streams = [rpc for rpc in calls if not rpc.is_idle and not rpc.has_all_requests]
        return brief or streams or receiving


def _cancel_oversent(rpc: Rpc, message: bytes | None) -> None:
    """End a call whose client has sent more than it was to."""
    if message is not None:
        rpc.cancel()


def _slowest_peer(rpcs: Sequence[Rpc]) -> tuple[str, list[Rpc]]:
    """Return the peer whose messages are waited for for longest, and the older half of its calls."""
    by_peer: dict[str, list[Rpc]] = defaultdict(list)
    for rpc in rpcs:
        by_peer[peer_key_of_grpc(rpc.peer)].append(rpc)
    now_s = time.monotonic()
    peer = max(
        by_peer,
        key=lambda one: sum(
            min(now_s - rpc.receive_began_s, _LONGEST_COUNTED_S) for rpc in by_peer[one]
        ),
        default="",
    )
    own = sorted(by_peer[peer], key=lambda rpc: rpc.receive_began_s)
    return peer, own[: (len(own) + 1) // 2]
