"""The lanes of a card. Each call that is computed has one to itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

from deconvd_server.call.context import CallContext
from deconvd_server.device.cuda.execution.lane import Lane

__all__ = ["LanePool"]

_POLL_INTERVAL_S: Final = 0.02
"""How often a call that waits for a lane checks whether it has been cancelled."""


class LanePool:
    """Lends each call a lane. Thread-safe.

    Attributes:
        streams: The lanes' streams.
        calls_count: Calls that have got a lane so far.

    Args:
        lanes: The pool has them to itself.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._count = len(lanes)
        self.streams = [lane.stream.pointer for lane in lanes]
        # The lane that was released last is lent first: it is the likeliest to have a graph of the kind of call.
        self._idle = [*lanes]
        self.calls_count = 0
        self._lock = threading.Lock()
        self._lane_released = threading.Condition(self._lock)

    @property
    def are_idle(self) -> bool:
        """Whether no call has a lane."""
        return len(self._idle) == self._count

    def lend(self, call: CallContext) -> AbstractContextManager[Lane]:
        """Lend a lane for the length of a with-block. Waits and raises as `acquire`."""
        return _LaneLease(self, call)

    def acquire(self, call: CallContext) -> Lane:
        """Return a lane, which the caller must `release`. Wait for one until the call ends.

        Raises:
            CallCancelledError, DeadlineError: The call has ended.
        """
        if not self._idle:
            call.note_long()
        with self._lock:
            call.check()
            while not self._idle:
                self._lane_released.wait(_POLL_INTERVAL_S)
                call.check()
            self.calls_count += 1
            return self._idle.pop()

    def release(self, lane: Lane) -> None:
        """Take a lane back, for the next call. The card must be done with it."""
        with self._lock:
            self._idle.append(lane)
            self._lane_released.notify()

    def close(self) -> Iterator[int]:
        """Close all lanes and yield their streams. No call may have a lane, and none may follow."""
        for _ in range(self._count):
            lane = self._idle.pop()
            lane.close()
            yield lane.stream.pointer


class _LaneLease(AbstractContextManager[Lane]):
    """See `LanePool.lend`. A class costs each call less than a context that is made of a generator."""

    __slots__ = ("_call", "_lane", "_lanes")

    def __init__(self, lanes: LanePool, call: CallContext) -> None:
        self._lanes = lanes
        self._call = call

    def __enter__(self) -> Lane:
        self._lane = self._lanes.acquire(self._call)
        return self._lane

    def __exit__(self, *_: object) -> None:
        self._lanes.release(self._lane)
