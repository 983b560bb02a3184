"""Asks the other processes to drop what a tenant can send again, where its quota has no room for what it keeps here.

The others are asked one after the other: two at the same time would both drop what makes room for one call. A request
goes to the supervisor, which passes it on. The answer is in the memory that all share, and so is whether the request is
still open: see `deconvd_server.resources.shared_quotas`.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Final

from deconvd_server.resources.shared_quotas import GiveRoom, SharedQuotas

__all__ = ["RoomRequests"]

_PATIENCE_S: Final = 2.0
"""How long a call waits for the others. One that is stopped does not answer."""

_TURN_S: Final = 0.25
"""After that time without an answer the next one is asked as well: one that is stopped must not keep it from that."""

_POLL_S: Final = 0.002

_REQUEST: Final = struct.Struct("<QQQ")
"""The process that asks, the number of its request, and how many bytes it needs. The owner's key follows.

Before it is the byte of the process that is asked, which the supervisor takes off.
"""

_log = logging.getLogger(__name__)


class RoomRequests:
    """The requests of this process to the others, and theirs to this one. Thread-safe.

    Args:
        quotas: What each process uses.
    """

    def __init__(self, quotas: SharedQuotas) -> None:
        self._quotas = quotas
        self._lock = threading.Lock()
        self._last_number = 0
        self._received: SimpleQueue[bytes] = SimpleQueue()

    def request(
        self,
        send: Callable[[bytes], None],
        owner: bytes,
        size_bytes: int,
        has_room: Callable[[], bool],
        check: Callable[[], None],
    ) -> bool:
        """Have the others make room in an owner's quota. Return whether there is some now.

        Args:
            send: Sends a request to the supervisor, as `Packet.ROOM` has it.
            owner: The owner's key.
            has_room: Returns whether there is room.
            check: Raises once the call that needs the room has ended.
        """
        used_bytes = self._quotas.used_by_others(owner)
        # who has most may have enough
        holders = sorted(
            (n for n, used in enumerate(used_bytes) if used), key=used_bytes.__getitem__
        )
        asked: dict[
            int, int
        ] = {}  # those that have not answered, with the numbers of their requests
        deadline_s = time.monotonic() + _PATIENCE_S
        turn_end_s = 0.0
        try:
            while not has_room():
                for holder in [n for n in asked if not self._may_answer(n, asked[n], owner)]:
                    self._close(asked.pop(holder))
                now_s = time.monotonic()
                if now_s > deadline_s:
                    _log.warning(
                        "other processes do not say whether they have made room for a tenant"
                    )
                    return False
                if holders and (not asked or now_s > turn_end_s):
                    holder = holders.pop()
                    number = self._open(send, holder, owner, size_bytes)
                    if number is None:
                        return has_room()
                    asked[holder], turn_end_s = number, now_s + _TURN_S
                elif not asked:
                    return has_room()
                check()
                time.sleep(_POLL_S)
            return True
        finally:  # before the call takes the room: it lacks again then, and nobody is to drop more
            for number in asked.values():
                self._close(number)

    def _open(
        self, send: Callable[[bytes], None], holder: int, owner: bytes, size_bytes: int
    ) -> int | None:
        """Ask one other process, and return the number of the request; None if too many are open."""
        with self._lock:  # sent in the order of their numbers
            # the process before this one at its place has had smaller ones
            number = self._last_number = max(self._last_number + 1, time.monotonic_ns())
            if not self._quotas.open_request(number):
                return None
            send(bytes([holder]) + _REQUEST.pack(self._quotas.number, number, size_bytes) + owner)
        return number

    def _close(self, number: int) -> None:
        with self._lock:
            self._quotas.close_request(number)

    def _may_answer(self, holder: int, number: int, owner: bytes) -> bool:
        """Return whether a process that was asked has not answered, and has anything: what ends has no more."""
        return not self._quotas.has_answered(holder, number) and bool(
            self._quotas.used_by_others(owner)[holder]
        )

    def note_request(self, request: bytes) -> None:
        """Take a request of another process, which is served in turn."""
        self._received.put(request)

    def start_serving(self, give_room: GiveRoom) -> None:
        """Serve the requests of others, in a thread of its own: to free tensors may take a while."""

        def run() -> None:
            while True:
                request = self._received.get()
                asker, number, size_bytes = _REQUEST.unpack_from(request)
                is_wanted = partial(self._quotas.is_open, asker, number)
                try:
                    give_room(request[_REQUEST.size :], size_bytes, is_wanted)
                except Exception:  # noqa: BLE001 - logged: others ask as well
                    _log.exception("unforeseen error while room was made for a tenant")
                self._quotas.answer(asker, number)

        threading.Thread(target=run, name="room", daemon=True).start()
