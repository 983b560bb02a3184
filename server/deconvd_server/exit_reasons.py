"""Reasons to end the process, in the order they come: signals, the loss of a device, the end of the drain."""

from __future__ import annotations

import signal
import socket
from queue import SimpleQueue

from deconvd_server.device.faults import DeviceLostError

__all__ = ["DrainResult", "ExitReason", "ExitReasons", "ServingLostError"]


class ServingLostError(Exception):
    """A part of the server that all calls depend on has ended by itself: the process must be started anew."""


class DrainResult:
    """The daemon has drained.

    Attributes:
        is_whole: Whether no call was cut short.
    """

    def __init__(self, is_whole: bool) -> None:
        self.is_clean = is_whole


ExitReason = signal.Signals | DeviceLostError | ServingLostError | DrainResult

_LEAST_TIMEOUT_S = 1e-3
"""Zero would mean not to wait, and raise another error."""

_NOT_A_SIGNAL = 0
"""The byte that stands for an end that is no signal."""


class ExitReasons:
    """The reasons to end that have come and not been taken. To be made in the main thread, once.

    The kernel may hand a signal to any thread. Python then notes it, but a main thread that waits
    for a lock sleeps on; so it waits for a socket here, into which Python's own C handler writes.
    """

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._others: SimpleQueue[DeviceLostError | ServingLostError | DrainResult] = SimpleQueue()
        signal.set_wakeup_fd(self._writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)

    def put(self, end: DeviceLostError | ServingLostError | DrainResult) -> None:
        """Add an end. May be called from any thread."""
        self._others.put(end)
        self._writer.send(bytes([_NOT_A_SIGNAL]))

    def take(self, timeout_s: float | None = None) -> ExitReason | None:
        """Wait for an end, and return it; None if none comes in time."""
        self._reader.settimeout(
            timeout_s if timeout_s is None else max(timeout_s, _LEAST_TIMEOUT_S)
        )
        try:
            (number,) = self._reader.recv(1)
        except TimeoutError:
            return None
        return self._others.get() if number == _NOT_A_SIGNAL else signal.Signals(number)
