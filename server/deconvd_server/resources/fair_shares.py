"""Fair shares of a limited number of places: a peer alone may have nearly all, and is preempted as others ask.

`deconvd_server.resources.peer_keys` says who counts as one peer. The same rule shares out direct connections, calls,
streams, sessions and borrowers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from deconvd.errors import UnavailableError

__all__ = ["FairShares", "PeerPlace"]

_RETRY_AFTER_S: Final = 0.5
"""What a refused peer is told: places are given back as calls end, and most are brief."""

_log = logging.getLogger(__name__)


class PeerPlace:
    """One place that a peer holds.

    Attributes:
        peer: Who holds it.
        progressed_s: When it last made progress, on the monotonic clock; infinity while the server works for it and
            does not wait for its peer. Any thread may set it: a store is all that a hot path can afford.
        is_idle: Whether nothing is under way there: then it gives way before its peer's others. Any thread may set it.
    """

    __slots__ = ("_shares", "is_idle", "peer", "preempt", "progressed_s")

    def __init__(self, shares: FairShares, peer: str, give_way: Callable[[], None]) -> None:
        self.peer = peer
        self.progressed_s = time.monotonic()
        self.is_idle = False
        self.preempt = give_way
        self._shares = shares

    def note_progress(self) -> None:
        """Note that its peer has just sent or taken something."""
        self.progressed_s = time.monotonic()

    def free(self) -> None:
        """Give it back, also if it was told to give way. Later times nothing is done."""
        self._shares.free(self)


class FairShares:
    """A number of places, and who holds them. Thread-safe.

    A peer takes places while more than the reserve are free, and its first one of the reserve, too. When there are no
    more, and another peer has at least two more than the one that asks, a place of the peer that has most gives way:
    an idle one, or else that which made no progress for longest. So a peer that has none gets a place as long as
    any has two. If no peer has so many, an idle place gives way: one of the asker's own, or of a peer that has more.

    Args:
        places_count: How many there are. As many again, at most, are on their way out: those that gave way, and whose
            owners have not freed them yet.
        reserved_count: How many of them are for peers that have none.
        what: What they are, in the plural, for errors.
    """

    def __init__(self, places_count: int, reserved_count: int, what: str) -> None:
        self._places_count = places_count
        self._reserved_count = reserved_count
        self._what = what
        self._lock = threading.Lock()
        self._places: dict[
            str, dict[PeerPlace, None]
        ] = {}  # by peer, in the order in which they came
        self._taken_count = 0
        self._preempted: set[PeerPlace] = set()

    @property
    def taken_count(self) -> int:
        """How many places are held, without those that gave way."""
        return self._taken_count

    def take(self, peer: str, give_way: Callable[[], None]) -> PeerPlace:
        """Take a place.

        Args:
            give_way: Called, in any thread and without a lock, when the place has become another's. It must not block.
                The owner must free the place soon after.

        Raises:
            UnavailableError: There is none for this peer now.
        """
        place = PeerPlace(self, peer, give_way)
        with self._lock:
            leaver = None if self._has_free(peer) else self._choose_preempted(peer)
            if leaver is not None:
                self._remove(leaver)
                self._preempted.add(leaver)
            self._places.setdefault(peer, {})[place] = None
            self._taken_count += 1
        if leaver is not None:
            _log.info("one of the %s of %s gives way to %s", self._what, leaver.peer, peer)
            try:
                leaver.preempt()
            except Exception:  # noqa: BLE001 - logged: who asks for a place has it all the same
                _log.exception("one of the %s did not give way in good order", self._what)
        return place

    def free(self, place: PeerPlace) -> None:
        """Give a place back. Later times nothing is done."""
        with self._lock:
            if place in self._places.get(place.peer, ()):
                self._remove(place)
            self._preempted.discard(place)

    def count_of(self, peer: str) -> int:
        """Return how many places a peer holds."""
        with self._lock:
            return len(self._places.get(peer, ()))

    def _has_free(self, peer: str) -> bool:
        reserved_count = self._reserved_count if peer in self._places else 0
        return self._places_count - self._taken_count > reserved_count

    def _choose_preempted(self, peer: str) -> PeerPlace:
        """Return what gives way to a peer. Raises UnavailableError if nothing does."""
        own_count = len(self._places.get(peer, ()))
        most = max(self._places.values(), key=len, default={})
        candidates = list(most)
        if len(candidates) < own_count + 2:
            candidates = [
                place
                for holder, places in self._places.items()
                if holder == peer or len(places) > own_count
                for place in places
                if place.is_idle
            ]
        if not candidates or len(self._preempted) >= self._places_count:
            raise UnavailableError(
                f"the server has no place for more {self._what}: {self._taken_count} of "
                f"{self._places_count} are taken, {own_count} by {peer}, and "
                f"{self._reserved_count} are for peers that have none",
                retry_after_s=_RETRY_AFTER_S,
            )
        return min(candidates, key=lambda place: (not place.is_idle, place.progressed_s))

    def _remove(self, place: PeerPlace) -> None:
        places = self._places[place.peer]
        del places[place]
        if not places:
            del self._places[place.peer]
        self._taken_count -= 1
