"""Reasons to end the process, in the order in which they come: signals, the loss of a device, the end of a drain."""

from __future__ import annotations

import signal
import socket
from enum import Enum
from queue import SimpleQueue

from deconvd_server.device.faults import DeviceLostError

__all__ = [
    "DrainResult",
    "ExitReason",
    "ExitReasons",
    "ServingLostError",
    "StopRequest",
    "StoppedError",
]


class ServingLostError(Exception):
    """A part of the server that all calls need has ended by itself: the process must be restarted."""


class StopRequest(Enum):
    """What the supervisor of a worker asks for. Asking twice for the same makes no difference."""

    DRAIN = "drain"
    """End, once the calls under way have ended."""

    CUT = "cut"
    """Cancel the calls that the drain waits for."""


class DrainResult:
    """The daemon has drained.

    Attributes:
        is_clean: Whether no call was cut short.
    """

    def __init__(self, is_clean: bool) -> None:
        self.is_clean = is_clean


class StoppedError(Exception):
    """A reason to end has come before the server could serve: it has nothing to lose.

    Args:
        reason: Of `ExitReasons`.
    """

    def __init__(self, reason: ExitReason) -> None:
        super().__init__(str(getattr(reason, "name", reason)))


ExitReason = signal.Signals | StopRequest | DeviceLostError | ServingLostError | DrainResult

_LEAST_TIMEOUT_S = 1e-3
"""A timeout of 0 would make the socket non-blocking, which raises another error."""

_NOT_A_SIGNAL = 0
"""The byte that announces a reason other than a signal."""


class ExitReasons:
    """The reasons to end that have come and have not been taken. Make it once, in the main thread.

    The kernel may deliver a signal to any thread. Python notes it, but a main thread that waits for a lock sleeps on.
    So the main thread waits for a socket here, and Python's own C handler writes each signal into it.

    Args:
        is_worker: Whether a supervisor says when calls are to be cut short. Then each signal is a request to drain, and
            no more: both the supervisor and systemd may send one.
    """

    def __init__(self, *, is_worker: bool = False) -> None:
        self._is_worker = is_worker
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._others: SimpleQueue[
            StopRequest | DeviceLostError | ServingLostError | DrainResult
        ] = SimpleQueue()
        signal.set_wakeup_fd(self._writer.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: None)

    def fileno(self) -> int:
        """Return a descriptor that can be read once there is a reason."""
        return self._reader.fileno()

    def put(self, reason: StopRequest | DeviceLostError | ServingLostError | DrainResult) -> None:
        """Add a reason. Any thread may call this."""
        self._others.put(reason)
        self._writer.send(bytes([_NOT_A_SIGNAL]))

    def take(self, timeout_s: float | None = None) -> ExitReason | None:
        """Wait for a reason, and return it; None if no reason comes in time."""
        self._reader.settimeout(
            timeout_s if timeout_s is None else max(timeout_s, _LEAST_TIMEOUT_S)
        )
        try:
            (number,) = self._reader.recv(1)
        except TimeoutError:
            return None
        if number == _NOT_A_SIGNAL:
            return self._others.get()
        return StopRequest.DRAIN if self._is_worker else signal.Signals(number)
