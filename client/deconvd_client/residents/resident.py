"""Resident: one tensor that the server keeps, with the array from which it can be sent again."""

from __future__ import annotations

from enum import Enum
from typing import Final

from deconvd.errors import InvalidArgumentError, LostTensorError
from deconvd.host.forks import new_reentrant_lock
from deconvd.model.problem import TensorSpec
from deconvd_client.residents.session import ResidentHandle
from deconvd_client.residents.source_array import SourceArray

__all__ = ["Resident", "ResidentState"]

_lock: Final = new_reentrant_lock()
"""Guards the transitions of all residents.

It is reentrant because a garbage collection inside a transition can run a caller's finalizer, in the same thread,
that closes another resident.
"""


class ResidentState(Enum):
    """Where a resident is.

    UNSENT --adopt--> RESIDENT --lose--> LOST --adopt--> RESIDENT
    RESIDENT --adopt, in a later session--> RESIDENT
    any of them --close--> CLOSED
    """

    UNSENT = "unsent"
    """The server has never had it. Its value is what the source holds at the time of the call that sends it."""

    RESIDENT = "resident"
    """The server has it, under a handle."""

    LOST = "lost"
    """The server no longer has it. It can be sent again if its source has not changed."""

    CLOSED = "closed"
    """Nobody needs it. Calls that still run with it no longer change its state."""


class Resident:
    """A tensor that the server keeps, or will keep after the next call with it. Thread-safe.

    Attributes:
        spec: Its shape and element type.
        state: Where it is. See `ResidentState`.
        source: The array it was made from. None if the server computed it, and once it is CLOSED.
        handle: Names it in requests. None unless it is RESIDENT. The server drops the tensor after the last
            reference to the handle is gone.
    """

    def __init__(
        self,
        spec: TensorSpec,
        *,
        source: SourceArray | None = None,
        handle: ResidentHandle | None = None,
    ) -> None:
        self.spec = spec
        self.source = source
        self.handle = handle
        self.state = ResidentState.UNSENT if handle is None else ResidentState.RESIDENT

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.state is ResidentState.CLOSED

    def duplicate(self) -> Resident:
        """Return another Resident for the same tensor. The server keeps the tensor until both are closed."""
        with _lock:
            other = Resident(self.spec, source=self.source, handle=self.handle)
            other.state = self.state
            return other

    def handle_for(self, session: bytes) -> ResidentHandle | None:
        """Return the handle if it is valid in a session, else None."""
        handle = self.handle
        return handle if handle is not None and handle.session == session else None

    def adopt(self, handle: ResidentHandle) -> None:
        """Note that the server keeps it under a handle. A handle of the same session that it has stays."""
        with _lock:
            if self.handle_for(handle.session) is None:
                self._move(ResidentState.RESIDENT, handle)

    def lose(self, handle: ResidentHandle) -> None:
        """Note that the server does not know a handle. A newer handle stays."""
        with _lock:
            if self.handle is handle:
                self._move(ResidentState.LOST)

    def close(self) -> None:
        """Let the server drop it, after the last running call with it."""
        with _lock:
            self._move(ResidentState.CLOSED)
            self.source = None

    def check_open(self, argument: str) -> None:
        """Raise InvalidArgumentError if it is closed."""
        if self.is_closed:
            raise InvalidArgumentError(
                f"{argument} was closed before this call. Call put() again, and close the RemoteTensor only after "
                "its last use.",
                argument=argument,
            )

    def require_source(self, argument: str) -> SourceArray:
        """Return the source, if its array still has the elements of the tensor.

        Raises:
            LostTensorError: There is no source, or its array has changed.
        """
        with _lock:
            state, source = self.state, self.source
        # comparing digests takes long, so it is done without the lock
        if source is not None and (state is ResidentState.UNSENT or source.is_unchanged):
            return source
        raise LostTensorError(
            f"{argument} is lost: the server no longer has it (it restarted or ran out of memory), "
            f"and {_loss_reason(state, source)}",
            argument=argument,
        )

    def _move(self, to: ResidentState, handle: ResidentHandle | None = None) -> None:
        """Change the state, unless it is CLOSED, which is final. The caller holds the lock."""
        if not self.is_closed:
            self.state, self.handle = to, handle


def _loss_reason(state: ResidentState, source: SourceArray | None) -> str:
    """Say why a lost tensor cannot be sent again, and what the caller can do."""
    if state is ResidentState.CLOSED:
        return "it was closed during the call: close it after its last use"
    if source is None:
        return "it was a result that only the server had: compute it again"
    return "the array it was made from has changed since: call put() or vjp() with the array again"
