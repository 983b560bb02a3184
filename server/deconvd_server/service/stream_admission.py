"""Who may stream: places that peers share, and memory. Streams that make no progress end, the sooner as others wait.

    WAITING --its turn--> ADMITTING --memory--> RUNNING
    any of them --its end, or told to give way--> gone

All of them are counted, and those that have their turn once more. The next turn is that of the peer that has fewest.
One at a time waits for memory: it comes first there, whoever comes meanwhile, so nobody has several who do.
A stream that waits for its client holds memory and a thread that others wait for:

    alone                           it ends after STALL_LIMIT_S
    others wait, who run fewer      it ends after _CONTENDED_STALL_S
    they have waited for long       one of the peer that runs most ends, whatever progress it makes
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from typing import Final

from deconvd.errors import UnavailableError
from deconvd_server.call.context import STALL_LIMIT_S, CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.engine.admission import Admission, Load
from deconvd_server.resources.fair_shares import FairShares, PeerPlace

__all__ = ["StreamAdmission"]

_CONTENDED_STALL_S: Final = 2.0
"""How long a stream may wait for its client while others wait for it: a pause of the network, not one to think."""

_PATIENCE_S: Final = 5.0
"""How long a stream waits for those of a peer that runs more: most streams end meanwhile, and none is lost."""

_POLL_PERIOD_S: Final = 0.25
"""How often the watch looks at streams, as long as there are any."""

_RESERVED_PART: Final = 8
"""One place in so many is for peers that have none."""

_RETRY_AFTER_S: Final = 0.5
"""What the client of a stream that had to end is told."""

_log = logging.getLogger(__name__)


class _StreamState(Enum):
    """Where a stream is before its end."""

    WAITING = "waiting"
    ADMITTING = "admitting"
    RUNNING = "running"


class StreamAdmission:
    """The places of streams, of either transport, and of tensors that are put and fetched in parts. Thread-safe.

    Args:
        admission: Lets streams run that have their turn, as long as there is memory.
        running_count: How many have their turn at once.
        waiting_count: How many more may wait for it.
        on_lost: Called with what is lost, if an error that was not foreseen ends the watch.
    """

    def __init__(
        self,
        admission: Admission,
        running_count: int,
        waiting_count: int,
        on_lost: Callable[[str], None],
    ) -> None:
        self._admission = admission
        places_count = running_count + waiting_count
        self._shares = FairShares(places_count, places_count // _RESERVED_PART, "streams")
        self._running_count = running_count
        self._on_lost = on_lost
        self._changed = threading.Condition()
        self._streams: dict[_StreamEntry, None] = {}  # in the order in which they came
        self._is_closed = False
        self._watch = threading.Thread(target=self._run, name="stream-watch", daemon=True)
        self._watch.start()

    @contextmanager
    def admit(self, footprint_bytes: int, call: CallContext) -> Iterator[None]:
        """Hold a place and `footprint_bytes` for the block, after waiting for them.

        Raises:
            UnavailableError: There is no place for this peer.
            ExhaustedError, CallCancelledError, DeadlineError: As `Admission.admitted` does.
        """
        self._admission.check_fits(footprint_bytes)
        stream = _StreamEntry(call)
        self._note_progress()
        stream.place = self._shares.take(call.peer_key, stream.preempt)
        try:
            self._wait_for_turn(stream)
            with self._admission.admit(footprint_bytes, call):
                self._mark_running(stream)
                yield
        finally:
            self._remove(stream)
            stream.place.free()

    @property
    def load(self) -> Load:
        """How many run and wait, and what they take."""
        load = self._admission.load
        with self._changed:
            waiting_count = sum(stream.state is _StreamState.WAITING for stream in self._streams)
        return replace(load, waiting_count=load.waiting_count + waiting_count)

    def close(self) -> None:
        """End the watch. No stream is under way any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._watch.join()

    def _wait_for_turn(self, stream: _StreamEntry) -> None:
        with self._changed:
            self._streams[stream] = None
            self._changed.notify_all()  # the watch, too
            if self._next() is stream:
                stream.state = _StreamState.ADMITTING
                return
        call = stream.call
        call.on_cancel(self._wake)
        with call.ledger.measure(Stage.QUEUE), self._changed:
            while self._next() is not stream:
                call.check()
                self._changed.wait(call.remaining_s())
            stream.state = _StreamState.ADMITTING

    def _mark_running(self, stream: _StreamEntry) -> None:
        with self._changed:
            stream.state = _StreamState.RUNNING
            self._changed.notify_all()  # the next may wait for memory

    def _next(self) -> _StreamEntry | None:
        """Return the stream whose turn is next: of the peer that has fewest, the first. None if none can have it."""
        if any(stream.state is _StreamState.ADMITTING for stream in self._streams):
            return None
        waiting = [s for s in self._streams if s.state is _StreamState.WAITING and not s.is_ending]
        counts = Counter(s.peer for s in self._streams if s.state is _StreamState.RUNNING)
        free_count = self._running_count - counts.total()
        reserved_count = self._running_count // _RESERVED_PART
        may_go = [s for s in waiting if free_count > (reserved_count if counts[s.peer] else 0)]
        return min(may_go, key=lambda stream: counts[stream.peer], default=None)

    def _remove(self, stream: _StreamEntry) -> None:
        with self._changed:
            self._streams.pop(stream, None)
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _all_streams(self) -> list[_StreamEntry]:
        with self._changed:
            return list(self._streams)

    def _note_progress(self) -> None:
        """Let the places know how far their streams are, before one has to give way: the last of those that wait."""
        for stream in self._all_streams():
            stream.place.progressed_s = (
                stream.blocked_since_s if stream.state is _StreamState.RUNNING else -stream.began_s
            )

    def _run(self) -> None:
        try:
            while self._wait_for_streams():
                for stream in _overdue_streams(self._all_streams(), time.monotonic()):
                    stream.preempt()
        except Exception:  # noqa: BLE001 - logged, and the server ends
            _log.exception("streams are watched no more: unforeseen error")
            self._on_lost("the watch over streams")

    def _wait_for_streams(self) -> bool:
        """Return when it is time to look at streams; False once that is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._streams or self._is_closed)
            return not self._changed.wait_for(lambda: self._is_closed, _POLL_PERIOD_S)


class _StreamEntry:
    """A stream that waits or runs.

    Attributes:
        place: Its place; set once it has one.
        state: Where it is.
        call: Its call.
        began_s: When it came, on the monotonic clock.
    """

    place: PeerPlace

    def __init__(self, call: CallContext) -> None:
        self.state = _StreamState.WAITING
        self.call = call
        self.began_s = time.monotonic()

    @property
    def peer(self) -> str:
        """By what its peer is counted."""
        return self.call.peer_key

    @property
    def blocked_since_s(self) -> float:
        """Since when it waits for its client; infinity while it does not."""
        return self.call.client_wait.blocked_since_s

    @property
    def is_ending(self) -> bool:
        """Whether it has been told to end, or its client has gone."""
        return self.call.is_cancelled

    def preempt(self) -> None:
        """Have it end; if it was told so and waits for its client all the same, break its connection."""
        if not self.call.is_cancelled:
            self.call.stop(
                UnavailableError(
                    "the stream gave way: it made no progress, or its peer had more of them than others who waited",
                    retry_after_s=_RETRY_AFTER_S,
                )
            )
        elif self.is_waiting_since(time.monotonic()):
            self.call.close_stream()

    def is_waiting_since(self, then_s: float) -> bool:
        """Return whether it has waited for its client since then, or for longer."""
        return self.blocked_since_s <= then_s


def _overdue_streams(streams: Sequence[_StreamEntry], now_s: float) -> list[_StreamEntry]:
    """Return the streams that are to end, those included that were told and have not ended yet."""
    running = [s for s in streams if s.state is _StreamState.RUNNING and not s.is_ending]
    overdue = [stream for stream in streams if stream.is_ending]
    overdue += [s for s in running if s.is_waiting_since(now_s - STALL_LIMIT_S)]
    counts = Counter(stream.peer for stream in running)
    waiting = [s for s in streams if s.state is not _StreamState.RUNNING and not s.is_ending]
    places_to_come = sum(stream.state is _StreamState.RUNNING for stream in overdue)
    for waiter in sorted(waiting, key=lambda stream: counts[stream.peer])[places_to_come:]:
        leaver = _choose_preempted(
            waiter, [stream for stream in running if stream not in overdue], now_s
        )
        if leaver is not None:
            overdue.append(leaver)
    return overdue


def _choose_preempted(
    waiter: _StreamEntry, running: Sequence[_StreamEntry], now_s: float
) -> _StreamEntry | None:
    """Return the stream that is to end for one that waits; None if it must wait on."""
    counts = Counter(stream.peer for stream in running)
    own_count = counts[waiter.peer]
    stalled = [
        stream
        for stream in running
        if counts[stream.peer] > own_count and stream.is_waiting_since(now_s - _CONTENDED_STALL_S)
    ]
    if stalled:
        return min(stalled, key=lambda stream: stream.blocked_since_s)
    most_count = max(counts.values(), default=0)
    if now_s - waiter.began_s < _PATIENCE_S or most_count < own_count + 2:
        return None
    biggest = [stream for stream in running if counts[stream.peer] == most_count]
    return min(biggest, key=lambda stream: stream.blocked_since_s)
