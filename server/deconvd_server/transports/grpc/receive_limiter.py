"""Limits the memory of messages that are still arriving by gRPC.

gRPC holds the part of a message that has arrived, and tells of the message only once it is whole. So nobody knows the
size of one partial message, and no budget can count it. But the size of all of them together can be measured:

    memory that the process has allocated
    - what budgets count
    - what the process had at rest

If that is over the limit, some calls that are sending end. Below the limit no call waits for another.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from deconvd.errors import UnavailableError
from deconvd.host.malloc import allocated_bytes
from deconvd.wire.status import status_from_error
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.transports.grpc.rpc import CallLater, Rpc

__all__ = ["ReceiveLimiter"]

_POLL_PERIOD_S: Final = 0.2
"""Time between two checks while there is more room than messages can fill in that time."""

_IDLE_CHECKS_COUNT: Final = 4
"""Checks without a measurement between two with one, as long as there is no call by gRPC: nothing arrives then, and
what the process has at rest changes slowly."""

_LEAST_POLL_PERIOD_S: Final = 0.005
"""Time between two checks when there is hardly any room."""

_FREE_S: Final = 0.04
"""How long gRPC has to free the messages of calls that were ended, before the next check."""

_FASTEST_BYTES_PER_S: Final = 2e9
"""How fast messages may arrive: gRPC receives less than that from all connections, on two processors."""

_END_OF_STREAM_S: Final = 0.01
"""How long gRPC has to tell that a client sends no more messages."""

_LONGEST_COUNTED_S: Final = 1.0
"""A message that has been awaited for longer counts only for this long: it may be a large one on a slow network."""

_RETRY_AFTER_S: Final = 0.5
"""When the client of an ended call may try again: the others' messages are whole or gone by then, as a rule."""

_STATUS_SEND_S: Final = 0.1
"""How long gRPC has to send the status of an ended call, before the call is broken off to free its message.

A client whose status was not sent in time sees CANCELLED, and does not try again. On a busy machine 20 ms were too few.
"""

_UNREAD_S: Final = 0.5
_UNREAD_BYTES: Final = 64 << 10
"""An answer of at most that many bytes that has not left for so long is of a client that does not read."""

_log = logging.getLogger(__name__)


class ReceiveLimiter:
    """Ends calls when messages that are still arriving take too much memory. All of it runs in gRPC's thread.

    It chooses the peer that has kept the server waiting for longest, summed over the peer's calls, and ends the older
    half of them. So a peer that sends little, or fast, is hardly ever chosen, and one that begins many messages and
    finishes none is, or that does not read small answers. If there is no such call, it chooses among streams, which may
    send ahead, and then among sessions, which are idle for most of their time.

    Args:
        rpcs: All calls.
        bound_bytes: The memory that messages may take before their calls are admitted.
        call_later: Calls `check` again.
        drain_events: Takes the events of messages that have arrived whole already.
    """

    def __init__(
        self,
        rpcs: Collection[Rpc],
        bound_bytes: int,
        call_later: CallLater,
        drain_events: Callable[[], None],
    ) -> None:
        self._rpcs = rpcs
        self._bound_bytes = bound_bytes
        self._call_later = call_later
        self._drain_events = drain_events
        self._budgeted_bytes: Callable[[], int] = lambda: 0
        self._pooled_bytes = 0
        self._rest_bytes = math.inf
        self._skipped_count = _IDLE_CHECKS_COUNT  # the first check measures

    def set_accounting(self, budgeted_bytes: Callable[[], int], pooled_bytes: int) -> None:
        """Set what else takes memory, once there is something. Call it while the process is at rest.

        Args:
            budgeted_bytes: Returns the memory that budgets count.
            pooled_bytes: The memory that pools may keep in addition.
        """
        self._budgeted_bytes = budgeted_bytes
        self._pooled_bytes = pooled_bytes
        self._rest_bytes = allocated_bytes() - budgeted_bytes()
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
            with suppress(MemoryError):  # what is left undone is done at the next check
                room_bytes = self._room_bytes()
                if room_bytes > 0:
                    wait_s = min(
                        max(room_bytes / _FASTEST_BYTES_PER_S, _LEAST_POLL_PERIOD_S), _POLL_PERIOD_S
                    )
                else:
                    self._make_room()
        finally:
            self._call_later(wait_s, self.check)

    def _room_bytes(self) -> float:
        """Return the memory that messages may still take; negative if they take too much."""
        budgeted_bytes = self._budgeted_bytes()
        uncounted_bytes = allocated_bytes() - budgeted_bytes
        # The least that was ever seen is what the process takes without any message. Budgets count memory before it is
        # allocated, which would make that too little: so it is seen only while they count none.
        if not budgeted_bytes:
            self._rest_bytes = min(self._rest_bytes, uncounted_bytes)
        return self._rest_bytes + self._pooled_bytes + self._bound_bytes - uncounted_bytes

    def _make_room(self) -> None:
        """End some calls. If there is none to end, the memory is not of messages: count it as at rest."""
        self._probe_completed()
        self._drain_events()
        peer, leavers = _slowest_peer(self._preemptible())
        if not leavers:
            self._rest_bytes -= self._room_bytes() - self._bound_bytes / 2
            return
        _log.warning(
            "%d calls of %s end: messages that are not admitted yet take more than %d bytes",
            *(len(leavers), peer, self._bound_bytes),
            extra={REPEAT_KEY: __name__},
        )
        error = UnavailableError(
            "the server has no memory for the call's messages: messages of all calls that are not admitted yet may "
            f"take {self._bound_bytes} bytes together",
            retry_after_s=_RETRY_AFTER_S,
        )
        failure = status_from_error(error)
        for rpc in leavers:
            rpc.fail(failure)
            self._call_later(_STATUS_SEND_S, rpc.cancel)

    def _probe_completed(self) -> None:
        """Ask for one more message in calls that should send none: honest clients have said that there is none.

        gRPC holds what a client has sent too much until it is asked for, and only then it shows.
        """
        for rpc in list(self._rpcs):
            if rpc.has_all_requests and not rpc.is_receiving:
                rpc.receive(partial(_cancel_oversent, rpc))

    def _preemptible(self) -> list[Rpc]:
        """Return the calls of which some must end: message by message and unread, else streams, else sessions."""
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
        return [*brief, *self._unread()] or streams or receiving

    def _unread(self) -> list[Rpc]:
        """Return the calls that are kept because their clients do not read small answers, which no budget counts."""
        until_s = time.monotonic() - _UNREAD_S
        return [
            rpc
            for rpc in list(self._rpcs)
            if rpc.answered_s < until_s and rpc.answer_bytes <= _UNREAD_BYTES
        ]


def _cancel_oversent(rpc: Rpc, message: bytes | None) -> None:
    """Break a call off whose client has sent a message too much."""
    if message is not None:
        rpc.cancel()


def _waits_since_s(rpc: Rpc) -> float:
    """Return since when the server has waited for the client: to take its answer, or to send a message."""
    return rpc.answered_s if rpc.answered_s < math.inf else rpc.receive_began_s


def _slowest_peer(rpcs: Sequence[Rpc]) -> tuple[str, list[Rpc]]:
    """Return the peer for whose messages the server has waited longest, and the older half of its calls."""
    by_peer: dict[str, list[Rpc]] = defaultdict(list)
    for rpc in rpcs:
        by_peer[rpc.caller.peer_key].append(rpc)
    now_s = time.monotonic()
    peer = max(
        by_peer,
        key=lambda one: sum(
            min(now_s - _waits_since_s(rpc), _LONGEST_COUNTED_S) for rpc in by_peer[one]
        ),
        default="",
    )
    own = sorted(by_peer[peer], key=_waits_since_s)
    return peer, own[: (len(own) + 1) // 2]
