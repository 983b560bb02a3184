"""Who has which memory, and how much each may have. No sockets here."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from deconvd.lending.protocol import ReplyStatus
from deconvd.model.problem import TensorSpec
from deconvd.wire.shared_slice import SharedSlice
from deconvd_server.device import Tensor
from deconvd_server.resources.cache import CacheEntry, Resource
from deconvd_server.resources.capabilities import CapabilityTable, new_name

__all__ = [
    "RESERVED_PART",
    "BorrowerAccount",
    "Lendable",
    "LoanLimits",
    "LoanRegistry",
    "OverLimitError",
    "RegionUse",
]

RESERVED_PART: Final = 8
"""One part in so many of all that is lent is for peers other than the one that has all the rest."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoanLimits:
    """How much may be lent.

    Attributes:
        all_bytes: To all clients together: to those of one peer, an eighth less, as long as one may have its own.
        client_bytes: To one client: one connection of its.
        all_regions_count: Regions in all, and of one peer an eighth less.
        client_regions_count: Regions of one client.
        clients_count: Clients at once.
    """

    all_bytes: int
    client_bytes: int
    all_regions_count: int = 256
    client_regions_count: int = 32
    clients_count: int = 128


class OverLimitError(Exception):
    """A client may not have as much as it asked for."""

    def __init__(self, answer: ReplyStatus, message: str) -> None:
        super().__init__(message)
        self.answer = answer


@dataclass(slots=True)
class _Usage:
    """Bytes and regions that were given out."""

    size_bytes: int = 0
    regions_count: int = 0

    def add(self, size_bytes: int, regions_count: int) -> None:
        self.size_bytes += size_bytes
        self.regions_count += regions_count


@dataclass(eq=False, slots=True)
class BorrowerAccount:
    """What one client has.

    Attributes:
        sum: What counts against its limits: what is being mapped for it too, and what it gave back
            while calls still use it, or while it still has it itself.
        names: Secret names of the regions that it may use.
        is_open: False once the client has gone.
        peer: By what the client is counted, together with others. See `deconvd_server.resources.peer_keys`.
        used_s: When a call last began to use what it has, on the monotonic clock.
    """

    usage: _Usage = field(default_factory=_Usage)
    names: set[bytes] = field(default_factory=set)
    is_open: bool = True
    peer: str = ""
    used_s: float = -math.inf


class Lendable(Protocol):
    """Memory that can be lent."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    def tensor(
        self, name: str, spec: TensorSpec, lies_at: SharedSlice, *, is_writable: bool
    ) -> Tensor:
        """Return a part of it as a tensor: an array, or a tensor on a card, which can be written in any case.

        Args:
            name: Name of the argument, for errors.

        Raises:
            InvalidArgumentError: As `SharedSlice.check` does.
        """

    def unmap(self) -> None:
        """Let go of it. Called once, when no one uses it."""

    def on_gone(self, then: Callable[[], None]) -> None:
        """Call `then` once no one else has it either, as far as can be known. Called once, after `unmap`."""


_M = TypeVar("_M", bound=Lendable)


class RegionUse(NamedTuple):
    """Someone's use of a region, which stays mapped until it ends.

    Attributes:
        memory: The region's.
        end: Ends it; to be called once.
    """

    memory: Lendable
    end: Callable[[], None]


class _LentRegion(NamedTuple, Generic[_M]):
    """A region that is lent, and to whom."""

    entry: CacheEntry[_M]
    account: BorrowerAccount


class LoanRegistry(Generic[_M]):
    """All that is lent of one kind. Thread-safe; memory is unmapped outside the lock, by whoever used it last.

    A region is lent, then retired, when its client gives it back or goes, then unmapped, when the
    last call that uses it has ended, then gone, when its client has let go of it too. Until then it counts: a client
    may go on to use its own mapping, as for results that it has yet to read, and its pages are there for as long.
    """

    def __init__(self, limits: LoanLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._usage = _Usage()
        self._lingering = _Usage()
        self._usage_by_peer: defaultdict[str, _Usage] = defaultdict(_Usage)
        self._lent: CapabilityTable[_LentRegion[_M]] = CapabilityTable()
        self._garbage: list[Resource[_M]] = []

    @property
    def size_bytes(self) -> int:
        """All that is mapped, or about to be."""
        with self._lock:
            return self._usage.size_bytes - self._lingering.size_bytes

    @property
    def lingering_bytes(self) -> int:
        """What is mapped here no more, and that clients still have."""
        with self._lock:
            return self._lingering.size_bytes

    def reserve(self, account: BorrowerAccount, size_bytes: int) -> None:
        """Count memory that is about to be made for a client.

        Raises:
            OverLimitError: It would be too much.
        """
        with self._lock:
            self._check_limits(account, size_bytes)
            self._count(account, size_bytes, 1)

    def cancel_reservation(self, account: BorrowerAccount, size_bytes: int) -> None:
        """Undo a `reserve` whose memory could not be made."""
        with self._lock:
            self._count(account, -size_bytes, -1)

    def lend(self, account: BorrowerAccount, memory: _M) -> bytes:
        """Lend memory that was reserved; return its secret name."""
        name = new_name()
        unmap = partial(self._unmap, account, memory)
        with self._lock:
            resource = Resource(memory, memory.size_bytes, unmap)
            self._lent.put(name, _LentRegion(CacheEntry(resource, self._garbage.append), account))
            account.names.add(name)
            if not account.is_open:
                self._retire(account, name)
            garbage = self._take_garbage()
        _free(garbage)
        return name

    def take_back(self, account: BorrowerAccount, name: bytes) -> bool:
        """Retire a region of a client; return False if it has none of that name."""
        with self._lock:
            is_known = name in account.names
            if is_known:
                self._retire(account, name)
            garbage = self._take_garbage()
        _free(garbage)
        return is_known

    def close(self, account: BorrowerAccount) -> None:
        """Retire all that a client has, and what is being made for it. It has gone."""
        with self._lock:
            account.is_open = False
            for name in tuple(account.names):
                self._retire(account, name)
            garbage = self._take_garbage()
        _free(garbage)

    def use(self, name: bytes) -> RegionUse | None:
        """Use a region; None if none of that name is lent."""
        with self._lock:
            lent = self._lent.get(name)
            if lent is None:
                return None
            entry, account = lent
            entry.acquire()
            account.used_s = time.monotonic()
        return RegionUse(entry.resource.value, partial(self._release, entry))

    def wait_until_unused(self, timeout_s: float) -> bool:
        """Wait until nothing is lent or mapped; return False if that takes longer than `timeout_s`."""
        with self._lock:
            return self._changed.wait_for(self._is_unused, timeout_s)

    def _is_unused(self) -> bool:
        return self._usage.regions_count == self._lingering.regions_count

    def _check_limits(self, account: BorrowerAccount, size_bytes: int) -> None:
        limits = self._limits
        if (
            account.usage.size_bytes + size_bytes > limits.client_bytes
            or account.usage.regions_count >= limits.client_regions_count
        ):
            raise OverLimitError(
                ReplyStatus.OVER_CLIENT_LIMIT,
                f"{size_bytes} bytes beside the {account.usage.size_bytes} that this client has or still keeps: the "
                f"server lends a client {limits.client_bytes} bytes and "
                f"{limits.client_regions_count} regions",
            )
        if (
            self._usage.size_bytes + size_bytes > limits.all_bytes
            or self._usage.regions_count >= limits.all_regions_count
        ):
            raise OverLimitError(
                ReplyStatus.OVER_SERVER_LIMIT,
                f"{size_bytes} bytes beside the {self._usage.size_bytes} that all clients have or still keep: the "
                f"server lends {limits.all_bytes} bytes and {limits.all_regions_count} regions",
            )

        of_peer = self._usage_by_peer.get(account.peer, _Usage())
        peer_bytes = max(limits.all_bytes - limits.all_bytes // RESERVED_PART, limits.client_bytes)
        if (
            of_peer.size_bytes + size_bytes > peer_bytes
            or of_peer.regions_count
            >= limits.all_regions_count - limits.all_regions_count // RESERVED_PART
        ):
            raise OverLimitError(
                ReplyStatus.OVER_SERVER_LIMIT,
                f"{size_bytes} bytes beside the {of_peer.size_bytes} that clients of {account.peer} "
                f"have or still keep: of the {limits.all_bytes} bytes and "
                f"{limits.all_regions_count} regions that the server lends, an eighth is for others",
            )

    def _count(self, account: BorrowerAccount, size_bytes: int, regions_count: int) -> None:
        of_peer = self._usage_by_peer[account.peer]
        for counted in (account.usage, of_peer, self._usage):
            counted.add(size_bytes, regions_count)
        if not of_peer.regions_count:
            del self._usage_by_peer[account.peer]
        self._changed.notify_all()

    def _retire(self, account: BorrowerAccount, name: bytes) -> None:
        account.names.remove(name)
        self._lent.pop(name).entry.retire()

    def _release(self, entry: CacheEntry[_M]) -> None:
        with self._lock:
            entry.release()
            garbage = self._take_garbage() if self._garbage else ()
        if garbage:
            _free(garbage)

    def _take_garbage(self) -> Sequence[Resource[_M]]:
        """Return what is to be freed, outside the lock."""
        if not self._garbage:
            return ()
        garbage, self._garbage[:] = self._garbage[:], []
        return garbage

    def _unmap(self, account: BorrowerAccount, memory: _M) -> None:
        try:
            memory.unmap()
        except Exception:  # noqa: BLE001 - logged: the memory still counts until it is gone
            _log.exception("shared memory could not be unmapped in good order")
        with self._lock:
            self._lingering.add(memory.size_bytes, 1)
            self._changed.notify_all()
        memory.on_gone(partial(self._forget, account, memory.size_bytes))

    def _forget(self, account: BorrowerAccount, size_bytes: int) -> None:
        with self._lock:
            self._lingering.add(-size_bytes, -1)
            self._count(account, -size_bytes, -1)


def _free(garbage: Iterable[Resource[_M]]) -> None:
    for resource in garbage:
        resource.free()
