"""Operands that are still arriving: their call is served already, so that a device can bring what is there.

    the transport       gives the progress of a request with it (`behaviours.OverlappedRequest`)
    exchange            makes an `Arriving` of each operand that the progress tells of
    engine              waits until all is there (`wait_for_all`), unless the device takes what is arriving
    the device          follows it piece by piece (`Following`), or takes what is there now (`require_all`)

Where a call holds a device meanwhile, it waits no longer than is fair to others, and then raises
ArrivalTimeoutError: the engine takes the device back, and makes the call again once all is there.
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
"""How often one who waits for operands looks whether the call is still wanted."""

_GRACE_S: Final = 5e-3
"""What operands may be late whose call has a device meanwhile, in addition to what their bytes take."""

_SLOWEST_BYTES_PER_S: Final = 2e9
"""The slowest copy for which a device is held."""


class ArrivalTimeoutError(Exception):
    """Operands did not arrive in the time that a call may keep others from a device."""


class ArrivalProgress(Protocol):
    """How far the operands of a request have come, one behind the other, as its transport knows.

    They come into memory where they stay. Today that is memory that is shared with the client, which
    writes it and tells by its line how far it is (`writing`). It may as well be registered memory into
    which the transport receives elements from the network: `wait_for` may be what receives them. It is
    for the thread that serves the call.
    """

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """Return whether that many bytes are there, as soon as they are, or once the time is up.

        Args:
            timeout_s: 0 to ask without waiting.

        Raises what tells its transport that the caller has gone: it is not to be caught on the way.
        """


class Arriving:
    """An operand that may not be there as a whole: an array in host memory that is filled front to back.

    Attributes:
        array: C-contiguous. What `wait_for` has not found there is not to be read.

    Args:
        progress: That of the request.
        begin_bytes: What arrives before it.
    """

    __slots__ = ("_begin_bytes", "_progress", "array")

    def __init__(self, array: Array, progress: ArrivalProgress, begin_bytes: int) -> None:
        self.array = array
        self._progress = progress
        self._begin_bytes = begin_bytes

    def wait_for(self, size_bytes: int, timeout_s: float) -> bool:
        """Return whether that many of its first bytes are there. See `Progress.wait_for`."""
        return self._progress.wait_for(self._begin_bytes + size_bytes, timeout_s)

    def has_arrived(self) -> bool:
        """Return whether all of it is there now."""
        return self.wait_for(self.array.nbytes, 0)


Operand: TypeAlias = Tensor | Arriving
"""What a call is made with: a tensor, or an array that is still being filled."""


def peek_tensor(operand: Operand) -> Tensor:
    """Return the array of an operand that is arriving, which may not be read yet; any other operand as it is."""
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
    """Return operands once all of them are there. Not for a call that holds a device.

    Raises as `Call.check` and `Progress.wait_for` do.
    """
    return {
        field: wait_for(operand, call) if isinstance(operand, Arriving) else operand
        for field, operand in operands.items()
    }


def require(operand: Operand) -> Tensor:
    """Return an operand if all of it is there now. Raises ArrivalTimeoutError, and as `Progress.wait_for` does."""
    if not isinstance(operand, Arriving):
        return operand
    if not operand.has_arrived():
        raise ArrivalTimeoutError
    return operand.array


def require_all(operands: Mapping[str, Operand]) -> dict[str, Tensor]:
    """Return operands if all of them are there now. Raises as `require`."""
    return {
        field: require(operand) if isinstance(operand, Arriving) else operand
        for field, operand in operands.items()
    }


class OverlappedOperands:
    """What a call that holds a device waits for: those of its operands that are not there as it begins.

    All its waits together, from the first on, may take what a slow copy of the operands takes.

    Attributes:
        operands: Those of the call, as arrays where they are there.
        is_early: Whether any of the call's were arriving.
        is_over: Whether all are there: then there is nothing to follow.
        waited_s: Seconds that were spent in `expect`.

    Raises as `Progress.wait_for` does.
    """

    def __init__(self, operands: Sequence[Operand]) -> None:
        arriving = [operand for operand in operands if isinstance(operand, Arriving)]
        there = {id(operand) for operand in arriving if operand.has_arrived()}
        self.operands: list[Operand] = [peek_tensor(o) if id(o) in there else o for o in operands]
        self.is_overlapped = bool(arriving)
        self.are_complete = len(there) == len(arriving)
        self.waited_s = 0.0
        self._fair_s = _GRACE_S + sum(o.array.nbytes for o in arriving) / _SLOWEST_BYTES_PER_S
        self._until_s: float | None = None

    def wait_for_all(self, operand: Operand) -> None:
        """Wait for all of an operand, if it is arriving. Raises as `expect`."""
        if isinstance(operand, Arriving):
            self.wait_for(operand, operand.array.nbytes)

    def wait_for(self, operand: Arriving, size_bytes: int) -> None:
        """Wait for that many bytes of an operand.

        Raises:
            ArrivalTimeoutError: That would be unfair to others: the device is to be left.
        """
        now_s = time.monotonic()
        if self._until_s is None:
            self._until_s = now_s + self._fair_s
        is_there = operand.wait_for(size_bytes, self._until_s - now_s)
        self.waited_s += time.monotonic() - now_s
        if not is_there:
            raise ArrivalTimeoutError
