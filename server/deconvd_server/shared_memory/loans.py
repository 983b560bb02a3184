"""Which client has borrowed which regions, and how much each may borrow. No sockets here.

Locks: one lock guards a `LoanRegistry` and the `BorrowerAccount`s that it is given. It is taken alone: memory is
unmapped, and `on_gone` called, without it. The mapper's thread lends, takes back and closes; calls, in their own
threads, begin and end uses; whoever ends the last use of a retired region unmaps it.
"""

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
"""One part in this many of all lent memory is reserved for other peers than the one that has the rest."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoanLimits:
    """How much may be lent.

    Attributes:
        all_bytes: Limit for all clients together. One peer gets an eighth less, but at least `client_bytes`.
        client_bytes: Limit for one client, which is one connection.
        all_regions_count: How many regions there may be. One peer gets an eighth less.
        client_regions_count: How many regions one client may have.
        clients_count: How many clients there may be at once.
    """

    all_bytes: int
    client_bytes: int
    all_regions_count: int = 256
    client_regions_count: int = 32
    clients_count: int = 128


class OverLimitError(Exception):
    """A client asked for more than it may have."""

    def __init__(self, status: ReplyStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class _Usage:
    """How many bytes and regions count against a limit."""

    size_bytes: int = 0
    regions_count: int = 0

    def add(self, size_bytes: int, regions_count: int) -> None:
        self.size_bytes += size_bytes
        self.regions_count += regions_count


@dataclass(eq=False, slots=True)
class BorrowerAccount:
    """What one client has borrowed.

    Attributes:
        usage: What counts against its limits: regions that are being mapped, lent, or retired and not gone yet.
        names: Secret names of the regions that it may use.
        is_open: False once the client has gone.
        peer: Key of the peer that the client belongs to. See `deconvd_server.resources.peer_identity`.
        used_s: When a call last began to use one of its regions, on the monotonic clock.
        identity: The identity of the calls that may use its regions: that of the first one. None before that.
    """

    usage: _Usage = field(default_factory=_Usage)
    names: set[bytes] = field(default_factory=set)
    is_open: bool = True
    peer: str = ""
    used_s: float = -math.inf
    identity: str | None = None


class Lendable(Protocol):
    """Memory that can be lent."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    def tensor(
        self, name: str, spec: TensorSpec, location: SharedSlice, *, is_writable: bool
    ) -> Tensor:
        """Return a part of it as a tensor: an array, or a tensor on a card, which is always writable.

        Args:
            name: Name of the argument, for errors.

        Raises:
            InvalidArgumentError: As `SharedSlice.check` does.
        """

    def unmap(self) -> None:
        """Unmap it here. Called once, when no call uses it."""

    def on_gone(self, then: Callable[[], None]) -> None:
        """Call `then` once no other process has it, as far as can be known. Called once, after `unmap`."""


_M = TypeVar("_M", bound=Lendable)


class RegionUse(NamedTuple):
    """A use of a region, which stays mapped until the use ends.

    Attributes:
        memory: The region's memory.
        end: Ends the use. Must be called exactly once.
    """

    memory: Lendable
    end: Callable[[], None]


class _LentRegion(NamedTuple, Generic[_M]):
    """A region that is lent, and the account of its client."""

    entry: CacheEntry[_M]
    account: BorrowerAccount


class LoanRegistry(Generic[_M]):
    """All lent regions of one kind of memory. Thread-safe.

        reserved --lend--> lent --take_back, close--> retired --last use ends--> lingering --client unmaps it--> gone

    A region counts against the limits until it is gone: as long as the client has it mapped, for
    instance to read results, its pages take memory.
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
        """How many bytes are mapped, or about to be."""
        with self._lock:
            return self._usage.size_bytes - self._lingering.size_bytes

    @property
    def lingering_bytes(self) -> int:
        """How many bytes are no longer mapped here, but still by clients."""
        with self._lock:
            return self._lingering.size_bytes

    def reserve(self, account: BorrowerAccount, size_bytes: int) -> None:
        """Count memory that is about to be allocated for a client.

        Raises:
            OverLimitError: It would exceed a limit.
        """
        with self._lock:
            self._check_limits(account, size_bytes)
            self._count(account, size_bytes, 1)

    def cancel_reservation(self, account: BorrowerAccount, size_bytes: int) -> None:
        """Undo a `reserve` whose memory could not be allocated."""
        with self._lock:
            self._count(account, -size_bytes, -1)

    def lend(self, account: BorrowerAccount, memory: _M) -> bytes:
        """Lend memory that was reserved, and return its secret name."""
        name = new_name()
        unmap = partial(self._unmap, account, memory)
        with self._lock:
            resource = Resource(memory, memory.size_bytes, unmap)
            self._lent.put(name, _LentRegion(CacheEntry(resource, self._garbage.append), account))
            account.names.add(name)
            if not account.is_open:  # the client has gone while its memory was mapped
                self._retire(account, name)
            garbage = self._take_garbage()
        _free(garbage)
        return name

    def take_back(self, account: BorrowerAccount, name: bytes) -> bool:
        """Retire a region of a client; return False if the client has none of that name."""
        with self._lock:
            is_known = name in account.names
            if is_known:
                self._retire(account, name)
            garbage = self._take_garbage()
        _free(garbage)
        return is_known

    def close(self, account: BorrowerAccount) -> None:
        """Retire all regions of a client that has gone. Those that are being mapped for it are retired by `lend`."""
        with self._lock:
            account.is_open = False
            for name in tuple(account.names):
                self._retire(account, name)
            garbage = self._take_garbage()
        _free(garbage)

    def use(self, name: bytes, identity: str = "") -> RegionUse | None:
        """Use a region; return None if no region of that name is lent for calls of that identity.

        Borrowers prove no identity on the lender's socket. But only the client knows the name of its region before
        its first call with it. So the identity of that call is the client's.
        """
        with self._lock:
            lent = self._lent.get(name)
            if lent is None:
                return None
            entry, account = lent
            if account.identity is None:
                account.identity = identity
            elif account.identity != identity:
                return None
            entry.acquire()
            account.used_s = time.monotonic()
        return RegionUse(entry.resource.value, partial(self._release, entry))

    def wait_until_unused(self, timeout_s: float) -> bool:
        """Wait until no region is lent or mapped; return False if that takes longer than `timeout_s`."""
        with self._lock:
            return self._changed.wait_for(self._is_unused, timeout_s)

    def _is_unused(self) -> bool:
        return self._usage.regions_count == self._lingering.regions_count

    def _check_limits(self, account: BorrowerAccount, size_bytes: int) -> None:
        limits, own = self._limits, account.usage
        over_client, over_server = ReplyStatus.OVER_CLIENT_LIMIT, ReplyStatus.OVER_SERVER_LIMIT
        peer_usage = self._usage_by_peer.get(account.peer, _Usage())
        peer_bytes = max(limits.all_bytes - limits.all_bytes // RESERVED_PART, limits.client_bytes)
        peer_count = limits.all_regions_count - limits.all_regions_count // RESERVED_PART
        # the client's own limit first: only then does it help if the client gives something back
        for status, owner, usage, limit_bytes, limit_count in (
            (over_client, "one client", own, limits.client_bytes, limits.client_regions_count),
            (over_server, "all clients", self._usage, limits.all_bytes, limits.all_regions_count),
            (over_server, f"all clients of {account.peer}", peer_usage, peer_bytes, peer_count),
        ):
            if usage.size_bytes + size_bytes > limit_bytes or usage.regions_count >= limit_count:
                raise OverLimitError(
                    status,
                    f"the server lends {owner} at most {limit_bytes} bytes in {limit_count} regions, of "
                    f"{limits.all_bytes} bytes in total: {usage.size_bytes} bytes in {usage.regions_count} regions "
                    f"are lent or still mapped, and {size_bytes} bytes more were asked for",
                )

    def _count(self, account: BorrowerAccount, size_bytes: int, regions_count: int) -> None:
        peer_usage = self._usage_by_peer[account.peer]
        for usage in (account.usage, peer_usage, self._usage):
            usage.add(size_bytes, regions_count)
        if not peer_usage.regions_count:
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
        """Return what to free after releasing the lock."""
        if not self._garbage:
            return ()
        garbage, self._garbage[:] = self._garbage[:], []
        return garbage

    def _unmap(self, account: BorrowerAccount, memory: _M) -> None:
        try:
            memory.unmap()
        except Exception:  # noqa: BLE001 - logged: the memory still counts until it is gone
            _log.exception("unmapping shared memory failed")
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
