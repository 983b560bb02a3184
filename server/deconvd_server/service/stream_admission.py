"""Admits streams: peers share a number of places and the host memory for streams.

    WAITING --its turn--> ADMITTING --memory is free--> RUNNING
    any state --the stream ends, or is preempted--> removed

Streams in any state take one of the places for all streams; those that run take one of the running places, too. The
next turn is that of the peer with the fewest running streams. Only one stream at a time waits for memory (ADMITTING):
it is the first to get it, so no peer can have several in that queue.

A stream that waits for its client holds memory and a thread that other streams wait for. So it is preempted:

    no stream waits                                  after STALL_LIMIT_S without progress
    peers wait that run fewer streams                after _CONTENDED_STALL_S without progress
    they have waited for longer than _PATIENCE_S     the peer with most running streams loses one that makes progress
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
from deconvd_server.engine.admission import Admission
from deconvd_server.engine.load import Load
from deconvd_server.resources.fair_shares import FairShares, PeerPlace

__all__ = ["StreamAdmission"]

_CONTENDED_STALL_S: Final = 2.0
"""How long a stream may wait for its client while other peers wait for a place. A network may pause for so long."""

_PATIENCE_S: Final = 5.0
"""How long a stream waits before another peer, which runs more, loses one for it. Most streams end sooner than that."""

_POLL_PERIOD_S: Final = 0.25
"""How often the watch looks at the streams, while there are streams."""

_RESERVED_PART: Final = 8
"""One place in eight is for peers that have no stream."""

_RETRY_AFTER_S: Final = 0.5
"""When the client of a preempted stream may try again."""

_log = logging.getLogger(__name__)


class _StreamState(Enum):
    """Where a stream is in its life."""

    WAITING = "waiting"
    ADMITTING = "admitting"
    RUNNING = "running"


class StreamAdmission:
    """Admits the streams of both transports, and the tensors that are put and fetched in parts. Thread-safe.

    Args:
        admission: The host memory for streams.
        running_count: How many streams may run at once.
        waiting_count: How many more may wait.
        on_lost: Called with the name of what is lost, if an unforeseen error ends the watch.
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
        """Wait for a place and `footprint_bytes`, and hold them for the block.

        Raises:
            UnavailableError: There is no place for this peer.
            ExhaustedError, CallCancelledError, DeadlineError: As `Admission.admit` does.
        """
        self._admission.check_fits(footprint_bytes)
        stream = _StreamEntry(call)
        self._note_progress()
        stream.place = self._shares.take(call.peer_key, stream.preempt)
        try:
            self._wait_for_turn(stream)
            with self._admission.admit(footprint_bytes, call):
                self._mark_running(stream)
                call.is_accepted = True  # its slices wait for the device, and are not refused
                yield
        finally:
            self._remove(stream)
            stream.place.free()

    @property
    def load(self) -> Load:
        """How many streams run and wait, and the memory that they take."""
        load = self._admission.load
        with self._changed:
            waiting_count = sum(stream.state is _StreamState.WAITING for stream in self._streams)
        return replace(load, waiting_count=load.waiting_count + waiting_count)

    def close(self) -> None:
        """End the watch. No stream may be under way any more."""
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
        """Return the stream whose turn is next: the first one of the peer with the fewest running streams.

        None if no stream may run now.
        """
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
        """Tell the places how far their streams are, before one is preempted for a new stream.

        A waiting stream has made the less progress the later it came, so the last one to come is preempted first.
        """
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
            _log.exception("streams are no longer watched: unforeseen error")
            self._on_lost("the watch over streams")

    def _wait_for_streams(self) -> bool:
        """Wait until it is time to look at the streams; return False once the watch must end."""
        with self._changed:
            self._changed.wait_for(lambda: self._streams or self._is_closed)
            return not self._changed.wait_for(lambda: self._is_closed, _POLL_PERIOD_S)


class _StreamEntry:
    """A stream that waits or runs.

    Attributes:
        place: Its place; set once it has one.
        state: Its state.
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
        """The peer that it counts for."""
        return self.call.peer_key

    @property
    def blocked_since_s(self) -> float:
        """The time since which it has waited for its client; infinity while it does not wait."""
        return self.call.client_wait.blocked_since_s

    @property
    def is_ending(self) -> bool:
        """Whether it has been preempted, or its client has gone."""
        return self.call.is_cancelled

    def preempt(self) -> None:
        """End it; if that was done before and it still waits for its client, break the client's connection."""
        if not self.call.is_cancelled:
            self.call.stop(
                UnavailableError(
                    "the stream was ended for others: it made no progress, or its peer had more streams than peers "
                    "that waited",
                    retry_after_s=_RETRY_AFTER_S,
                )
            )
        elif self.is_waiting_since(time.monotonic()):
            self.call.close_stream()

    def is_waiting_since(self, then_s: float) -> bool:
        """Return whether it has waited for its client since a time, or for longer."""
        return self.blocked_since_s <= then_s


def _overdue_streams(streams: Sequence[_StreamEntry], now_s: float) -> list[_StreamEntry]:
    """Return the streams to preempt, and again those that were preempted and have not ended yet."""
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
    """Return the running stream to preempt for one that waits; None if that must wait on."""
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
