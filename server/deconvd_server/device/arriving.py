"""Operands of overlapped calls, which are still arriving while their call is served.

    transport           passes the progress of a request along with it (`OverlappedRequest`)
    CallTensors         makes an `Arriving` of each operand whose progress it knows
    Engine              waits for all operands (`wait_for_all`), unless the device takes arriving ones
    device              waits for each piece of them (`OverlappedOperands`), or refuses to wait (`require_all`)

A call that holds a device waits only as long as is fair to the other calls. Then it raises ArrivalTimeoutError. The
engine takes the device back, and calls it again once all operands are there.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, TypeAlias

from deconvd.model.dtypes import Array
from deconvd_server.call.context import CallContext
from deconvd_server.device.tensor import Tensor

__all__ = [
    "ArrivalProgress",
    "ArrivalTimeoutError",
    "Arriving",
    "Operand",
    "OverlappedOperands",
    "peek_tensor",
    "require",
    "require_all",
    "wait_for",
    "wait_for_all",
]

_POLL_INTERVAL_S: Final = 0.5
"""How often a call that waits for operands checks whether it has been cancelled."""

_GRACE_S: Final = 5e-3
"""How long a call that holds a device may wait for operands, in addition to the time of a copy."""

_SLOWEST_BYTES_PER_S: Final = 2e9
"""The rate of the slowest copy for which a call that holds a device waits."""


class ArrivalTimeoutError(Exception):
    """Operands did not arrive in the time for which a call may keep other calls from a device."""


class ArrivalProgress(Protocol):
    """The number of bytes of a request's operands that have arrived. The operands arrive one after the other.

    They arrive in memory where they stay. Today that is memory that is shared with the client: it writes there, and
    reports its progress over the direct connection. It could also be registered memory into which a transport receives
    elements from the network, in `wait_for` itself. Only the thread that serves the call may use it.
    """

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """Wait for that many bytes. Return True as soon as they are there, False once the time is up.

        Args:
            timeout_s: 0 to ask without waiting.

        Raises an error of the transport if the caller has gone. Nothing between may catch it: the transport does.
        """


class Arriving:
    """An operand that may not be complete yet: an array in host memory that is filled front to back.

    Attributes:
        array: C-contiguous. Bytes that `wait_for` has not confirmed must not be read.

    Args:
        progress: The request's.
        begin_bytes: Bytes of the request's operands that arrive before this one.
    """

    __slots__ = ("_begin_bytes", "_progress", "array")

    def __init__(self, array: Array, progress: ArrivalProgress, begin_bytes: int) -> None:
        self.array = array
        self._progress = progress
        self._begin_bytes = begin_bytes

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """Return whether that many of its first bytes are there. See `ArrivalProgress.wait_for`."""
        return self._progress.wait_for(self._begin_bytes + size_bytes, timeout_s)

    @property
    def end_bytes(self) -> int:
        """How many bytes of the request's operands have arrived once all of this one is there."""
        return self._begin_bytes + self.array.nbytes

    def has_arrived(self) -> bool:
        """Return whether all of it is there now."""
        return self.wait_for(self.array.nbytes, 0)


Operand: TypeAlias = Tensor | Arriving
"""An operand of a call: a tensor, or an array that is still being filled."""


def peek_tensor(operand: Operand) -> Tensor:
    """Return the array of an arriving operand, which must not be read yet, or any other operand as it is."""
    return operand.array if isinstance(operand, Arriving) else operand


def wait_for(operand: Operand, call: CallContext) -> Tensor:
    """Return an operand once all of it is there. See `wait_for_all`."""
    if not isinstance(operand, Arriving):
        return operand
    while True:
        call.check()
        remaining_s = call.remaining_s()
        wait_s = _POLL_INTERVAL_S if remaining_s is None else min(remaining_s, _POLL_INTERVAL_S)
        if operand.wait_for(operand.array.nbytes, wait_s):
            return operand.array


def wait_for_all(operands: Mapping[str, Operand], call: CallContext) -> dict[str, Tensor]:
    """Return operands once all of them are there. A call that holds a device must not use it: the wait has no bound.

    Raises as `CallContext.check` and `ArrivalProgress.wait_for` do.
    """
    arriving = [operand for operand in operands.values() if isinstance(operand, Arriving)]
    # the last one first: the others are there by then, and the thread has been woken up once
    for operand in sorted(arriving, key=lambda operand: operand.end_bytes, reverse=True):
        wait_for(operand, call)
    return {field: peek_tensor(operand) for field, operand in operands.items()}


def require(operand: Operand) -> Tensor:
    """Return an operand if all of it is there now; else raise ArrivalTimeoutError, or as `ArrivalProgress.wait_for`."""
    if not isinstance(operand, Arriving):
        return operand
    if not operand.has_arrived():
        raise ArrivalTimeoutError
    return operand.array


def require_all(operands: Mapping[str, Operand]) -> dict[str, Tensor]:
    """Return operands if all of them are there now. Raises as `require` does."""
    return {
        field: require(operand) if isinstance(operand, Arriving) else operand
        for field, operand in operands.items()
    }


class OverlappedOperands:
    """The operands of a call that holds a device. Waits for those that are not there when the call starts.

    All waits together, and the work between them, may take as long as a slow copy of the operands.

    Attributes:
        operands: The call's, as arrays if they are there.
        is_overlapped: Whether any of them was arriving.
        are_complete: Whether all of them were there at the start.
        waited_s: Seconds that were spent in `wait_for`.

    Raises as `ArrivalProgress.wait_for` does.
    """

    def __init__(self, operands: Sequence[Operand]) -> None:
        arriving = [operand for operand in operands if isinstance(operand, Arriving)]
        complete = {id(operand) for operand in arriving if operand.has_arrived()}
        self.operands: list[Operand] = [
            peek_tensor(o) if id(o) in complete else o for o in operands
        ]
        self.is_overlapped = bool(arriving)
        self.are_complete = len(complete) == len(arriving)
        self.waited_s = 0.0
        self._fair_s = _GRACE_S + sum(o.array.nbytes for o in arriving) / _SLOWEST_BYTES_PER_S
        self._until_s: float | None = None

    def wait_for_all(self, operand: Operand) -> None:
        """Wait for all of an operand, if it is arriving. Raises as `wait_for` does."""
        if isinstance(operand, Arriving):
            self.wait_for(operand, operand.array.nbytes)

    def wait_for(self, operand: Arriving, size_bytes: int) -> None:
        """Wait for that many bytes of an operand.

        Raises:
            ArrivalTimeoutError: A longer wait would be unfair to other calls. The call must leave the device.
        """
        now_s = time.monotonic()
        if self._until_s is None:  # the time counts from the first wait
            self._until_s = now_s + self._fair_s
        is_there = operand.wait_for(size_bytes, self._until_s - now_s)
        self.waited_s += time.monotonic() - now_s
        if not is_there:
            raise ArrivalTimeoutError
