"""Fair shares of a limited number of places: one peer may have nearly all, until other peers ask for some.

`deconvd_server.resources.peer_identity` says which connections count as one peer. Direct connections, calls, streams,
sessions and borrowers are all shared by this rule.

Locks: `FairShares` has one lock, and calls nothing with it held. So it may be called with other locks held; the
callback `preempt` then runs with those held, too.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from deconvd.errors import UnavailableError
from deconvd_server.log_handler import REPEAT_KEY

__all__ = ["FairShares", "PeerPlace"]

_RETRY_AFTER_S: Final = 0.5
"""How long a refused peer should wait: places are free again when calls end, and most calls are short."""

_log = logging.getLogger(__name__)


class PeerPlace:
    """One place that a peer holds.

    Attributes:
        peer: Key of the peer.
        preempt: Takes the place away from its owner: see `FairShares.take`.
        progressed_s: When it last made progress, on the monotonic clock; infinity while the server works for it and
            does not wait for its peer. Any thread may set it, without a lock: it is set on hot paths.
        is_idle: Whether nothing is in progress there. An idle place is preempted before others of its peer. Any
            thread may set it.
    """

    __slots__ = ("_shares", "is_idle", "peer", "preempt", "progressed_s")

    def __init__(self, shares: FairShares, peer: str, preempt: Callable[[], None]) -> None:
        self.peer = peer
        self.progressed_s = time.monotonic()
        self.is_idle = False
        self.preempt = preempt
        self._shares = shares

    def note_progress(self) -> None:
        """Note that its peer has just sent or received something."""
        self.progressed_s = time.monotonic()

    def free(self) -> None:
        """Give it back. This must also be called after `preempt`. Further calls do nothing."""
        self._shares.free(self)


class FairShares:
    """A number of places, and which peers hold them. Thread-safe.

    A peer gets a place

    1. if more places are free than are reserved, or if any is free and it has none yet;
    2. else, if another peer has at least two places more than it: then the peer that has most loses one, an
       idle one, or else the one that made no progress for longest;
    3. else, if an idle place is its own or is a peer's that has more places: then that one is preempted.

    So a peer that has no place gets one as long as any peer has two.

    Args:
        places_count: How many places there are. At most as many again may be preempted, but not freed yet.
        reserved_count: How many places are reserved for peers that have none.
        plural_noun: What the places are for, for errors.
        log_level: Of the line in the log for each place that is preempted: low where strangers may cause many.
    """

    def __init__(
        self,
        places_count: int,
        reserved_count: int,
        plural_noun: str,
        log_level: int = logging.INFO,
    ) -> None:
        self._log_level = log_level
        self._places_count = places_count
        self._reserved_count = reserved_count
        self._plural_noun = plural_noun
        self._lock = threading.Lock()
        # by peer, in the order in which they were taken
        self._places: dict[str, dict[PeerPlace, None]] = {}
        self._taken_count = 0
        self._preempted: set[PeerPlace] = set()

    @property
    def taken_count(self) -> int:
        """How many places are held, without preempted ones."""
        return self._taken_count

    def take(self, peer: str, preempt: Callable[[], None]) -> PeerPlace:
        """Take a place.

        Args:
            preempt: Called when another peer gets the place: in any thread, and without the lock of this object. It
                must not block. The owner must free the place soon after.

        Raises:
            UnavailableError: There is no place for this peer now.
        """
        place = PeerPlace(self, peer, preempt)
        with self._lock:
            preempted = None if self._has_free(peer) else self._choose_preempted(peer)
            if preempted is not None:
                self._remove(preempted)
                self._preempted.add(preempted)
            self._places.setdefault(peer, {})[place] = None
            self._taken_count += 1
        if preempted is not None:
            _log.log(
                self._log_level,
                "preempting one of the %s of %s for %s",
                self._plural_noun,
                preempted.peer,
                peer,
                extra={REPEAT_KEY: (__name__, self._plural_noun)},  # strangers may cause many
            )
            try:
                preempted.preempt()
            except Exception:  # noqa: BLE001 - logged: who asks for a place has it all the same
                _log.exception("preempting one of the %s failed", self._plural_noun)
        return place

    def free(self, place: PeerPlace) -> None:
        """Give a place back. Further calls do nothing."""
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
        """Return the place to preempt for a peer. Raises UnavailableError if there is none."""
        own_count = len(self._places.get(peer, ()))
        largest = max(self._places.values(), key=len, default={})
        candidates = list(largest)
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
                f"the server has no place for more {self._plural_noun}: {self._taken_count} of "
                f"{self._places_count} are taken, {own_count} of them by {peer}, and "
                f"{self._reserved_count} are reserved for peers that have none",
                retry_after_s=_RETRY_AFTER_S,
            )
        return min(candidates, key=lambda place: (not place.is_idle, place.progressed_s))

    def _remove(self, place: PeerPlace) -> None:
        places = self._places[place.peer]
        del places[place]
        if not places:
            del self._places[place.peer]
        self._taken_count -= 1
