"""Asks the other processes to drop what a tenant can send again, where its quota has no room for what it keeps here.

A request goes to the supervisor, which passes it on to all others. Their answers are in the memory that all share: see
`deconvd_server.resources.shared_quotas`.
"""

from __future__ import annotations

import logging
import struct
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from deconvd_server.resources.shared_quotas import SharedQuotas

__all__ = ["RoomRequests"]

_PATIENCE_S: Final = 2.0
"""How long a call waits for the others. One that is stopped does not answer."""

_POLL_S: Final = 0.002

_REQUEST: Final = struct.Struct("<QQQ")
"""The process that asks, the number of its request, and how many bytes it needs. The owner's key follows."""

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
            send: Sends a request to the supervisor.
            owner: The owner's key.
            has_room: Returns whether there is room.
            check: Raises once the call that needs the room has ended.
        """
        holders = [n for n, used in enumerate(self._quotas.used_by_others(owner)) if used]
        if not holders:
            return has_room()
        with self._lock:  # sent in the order of their numbers
            # the process before this one at its place has had smaller ones
            number = self._last_number = max(self._last_number + 1, time.monotonic_ns())
            send(_REQUEST.pack(self._quotas.number, number, size_bytes) + owner)
        deadline_s = time.monotonic() + _PATIENCE_S
        while not has_room():
            if all(self._quotas.has_answered(holder, number) for holder in holders):
                return has_room()
            if time.monotonic() > deadline_s:
                _log.warning("other processes do not say whether they have made room for a tenant")
                return False
            check()
            time.sleep(_POLL_S)
        return True

    def note_request(self, request: bytes) -> None:
        """Take a request of another process, which is served in turn."""
        self._received.put(request)

    def start_serving(self, give_room: Callable[[bytes, int], None]) -> None:
        """Serve the requests of others, in a thread of its own: to free tensors may take a while.

        Args:
            give_room: Drops tensors of an owner, by its key, until there is room for that many bytes.
        """

        def run() -> None:
            while True:
                request = self._received.get()
                asker, number, size_bytes = _REQUEST.unpack_from(request)
                try:
                    give_room(request[_REQUEST.size :], size_bytes)
                except Exception:  # noqa: BLE001 - logged: others ask as well
                    _log.exception("unforeseen error while room was made for a tenant")
                self._quotas.answer(asker, number)

        threading.Thread(target=run, name="room", daemon=True).start()
