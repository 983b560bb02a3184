"""The lanes of a card: each call that is computed has one to itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

from deconvd_server.call.context import CallContext
from deconvd_server.device.cuda.execution.lane import Lane

__all__ = ["LanePool"]

_POLL_INTERVAL_S: Final = 0.02
"""How often one who waits for a lane looks whether its call is still wanted."""


class LanePool:
    """Lanes, lent one to a call. Thread-safe.

    Args:
        lanes: No one else uses them.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._count = len(lanes)
        # the last lane given back comes first: it is the likeliest to know the kind of call
        self._idle = [*lanes]
        self._lock = threading.Lock()
        self._lane_released = threading.Condition(self._lock)

    @property
    def are_idle(self) -> bool:
        """Whether no call has one."""
        return len(self._idle) == self._count

    def lend(self, call: CallContext) -> AbstractContextManager[Lane]:
        """Lend a lane to a block, after waiting for one while the call lives. Raises as `take`."""
        return _LaneLease(self, call)

    def acquire(self, call: CallContext) -> Lane:
        """Return a lane, to be given back; waits for one while the call lives.

        Raises:
            CallCancelledError, DeadlineError: The call has ended.
        """
        with self._lock:
            call.check()
            while not self._idle:
                self._lane_released.wait(_POLL_INTERVAL_S)
                call.check()
            return self._idle.pop()

    def release(self, lane: Lane) -> None:
        """Let others have a lane."""
        with self._lock:
            self._idle.append(lane)
            self._lane_released.notify()

    def close(self) -> Iterator[int]:
        """Close all; yield their streams. No call may have one, and none may follow."""
        for _ in range(self._count):
            lane = self._idle.pop()
            lane.close()
            yield lane.stream.pointer


class _LaneLease(AbstractContextManager[Lane]):
    """A lane for the length of a block. See `Lanes.lend`."""

    __slots__ = ("_call", "_lane", "_lanes")

    def __init__(self, lanes: LanePool, call: CallContext) -> None:
        self._lanes = lanes
        self._call = call

    def __enter__(self) -> Lane:
        self._lane = self._lanes.acquire(self._call)
        return self._lane

    def __exit__(self, *_: object) -> None:
        self._lanes.release(self._lane)
