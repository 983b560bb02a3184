"""How much of its quota each owner of residents uses in each of several processes that serve as one.

The processes share memory, and no lock: one that is stopped would hold it. Each writes its own row alone, and reads
those of others. It writes what it is about to use before it looks whether there is room, and takes that back if there
is not. Of two that do so at the same time, at least one sees the other's bytes. So together they never use more than
the quota. Both may find that there is no room, where there was room for one.

A row stays as it is while its process is stopped, which has its memory still. The supervisor clears it once the process
has ended.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import Final, TypeAlias

import numpy as np

from deconvd_server.resources.worker_table import MAX_WORKERS_COUNT

__all__ = [
    "OWNER_BYTES",
    "QUOTA_SHARING",
    "GiveRoom",
    "QuotaSharing",
    "SharedQuotas",
    "create_shared_quotas",
]

GiveRoom: TypeAlias = Callable[[bytes, int, Callable[[], bool]], None]
"""Drops tensors of an owner, by its key, until there is room for that many bytes, or until they are wanted no more."""

OWNER_BYTES: Final = 16
"""Size of the key of an owner."""

_SLOTS_COUNT: Final = 1024
"""How many owners may have residents in one process: more than its sessions, and calls of ended sessions."""

_OPEN_REQUESTS_COUNT: Final = 256
"""How many requests for room one process may have open at others: one of each call that waits, or a few."""

_ROW: Final = np.dtype(
    [
        # the two halves of each owner's key: to look for one half in memory without gaps is fast
        ("owners", "<u8", (OWNER_BYTES // 8, _SLOTS_COUNT)),
        ("used_bytes", "<i8", _SLOTS_COUNT),
        ("answered", "<u8", MAX_WORKERS_COUNT),
        ("open_requests", "<u8", _OPEN_REQUESTS_COUNT),  # their numbers, 0 where there is none
    ]
)


def create_shared_quotas(count: int) -> int:
    """Make the memory for a number of processes, and return its descriptor, which they inherit."""
    descriptor = os.memfd_create("deconvd-quotas")
    os.ftruncate(descriptor, _ROW.itemsize * count)
    return descriptor


class SharedQuotas:
    """The rows of all processes, as one of them sees them. Not thread-safe: its owner's lock guards what changes a row.

    Args:
        descriptor: Of `create_shared_quotas`. It may be closed afterwards.
        number: The number of this process's row.
    """

    def __init__(self, descriptor: int, number: int = 0) -> None:
        self.number = number
        size_bytes = os.fstat(descriptor).st_size
        self._rows = np.frombuffer(mmap.mmap(descriptor, size_bytes), _ROW)
        self._first_halves = self._rows["owners"][:, 0]
        self._slots: dict[bytes, int] = {}
        self._free = list(range(_SLOTS_COUNT))

    @property
    def count(self) -> int:
        """How many processes there are."""
        return len(self._rows)

    def clear(self, number: int) -> None:
        """Forget what a process has used that has ended."""
        self._rows[number : number + 1] = np.zeros(1, _ROW)

    def publish(self, owner: bytes, used_bytes: int) -> bool:
        """Tell the others how much an owner uses here. Return whether there was a place to write it.

        Args:
            owner: The owner's key.
        """
        row = self._rows[self.number]
        slot = self._slots.get(owner)
        if slot is None:
            if not self._free:
                return False
            slot = self._slots[owner] = self._free.pop()
            row["owners"][:, slot] = np.frombuffer(owner, "<u8")
        row["used_bytes"][slot] = used_bytes
        if not used_bytes:
            row["owners"][:, slot] = 0
            self._free.append(self._slots.pop(owner))
        return True

    def used_by_others(self, owner: bytes) -> list[int]:
        """Return how many bytes an owner uses in each process; 0 for this one."""
        first, second = np.frombuffer(owner, "<u8")
        used_bytes = [0] * self.count
        # by one half of the key first: this is done with the registry's lock held, for each tensor that is dropped
        for number, slot in zip(*np.nonzero(self._first_halves == first), strict=True):
            if number != self.number and self._rows["owners"][number, 1, slot] == second:
                used_bytes[number] += int(self._rows["used_bytes"][number, slot])
        return used_bytes

    def open_request(self, number: int) -> bool:
        """Tell the others that this process wants what its request of that number asks for. Return whether it could."""
        requests = self._rows[self.number]["open_requests"]
        free = np.flatnonzero(requests == 0)
        if free.size:
            requests[free[0]] = number
        return bool(free.size)

    def close_request(self, number: int) -> None:
        """Tell the others that this process wants no more of what an open request asks for."""
        requests = self._rows[self.number]["open_requests"]
        requests[requests == number] = 0

    def is_open(self, asker: int, number: int) -> bool:
        """Return whether a process still wants what its request of that number asks for."""
        return number in self._rows[asker]["open_requests"]

    def answer(self, asker: int, number: int) -> None:
        """Tell a process that its request of that number, and all before it, have been served here."""
        self._rows[self.number]["answered"][asker] = number

    def has_answered(self, other: int, number: int) -> bool:
        """Return whether another process has served this one's request of that number."""
        return bool(self._rows[other]["answered"][self.number] >= number)


class QuotaSharing:
    """How this process counts quotas together with others.

    Attributes:
        quotas: What each process uses; None if this one serves alone, or there are no quotas.
        request_room: Has the others make room in an owner's quota. Returns whether there is some now. Takes the owner's
            key, the bytes that are needed, a function that returns whether there is room, and one that raises once the
            call has ended that needs it.
        start_serving: Called with the function that makes room here for the others, once there is one. That takes an
            owner's key, the bytes that are needed, and a function that returns whether they still are.
    """

    def __init__(self) -> None:
        self.quotas: SharedQuotas | None = None
        self.request_room: Callable[[bytes, int, Callable[[], bool], Callable[[], None]], bool] = (
            lambda *_: False
        )
        self.start_serving: Callable[[GiveRoom], None] = lambda _: None


QUOTA_SHARING: Final = QuotaSharing()
"""That of this process."""
