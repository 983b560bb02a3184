"""One tensor on the server, and what it takes to send it again."""

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
"""For the transitions of all tensors. A caller's finalizer may close one in the midst of another's transition."""


class ResidentState(Enum):
    """Where a tensor is.

    UNSENT --adopted--> RESIDENT --lost--> LOST --adopted--> RESIDENT
    RESIDENT --adopted, in a later session--> RESIDENT
    any of them --closed--> CLOSED
    """

    UNSENT = "unsent"
    """The server has never had it: its source holds what it holds."""

    RESIDENT = "resident"
    """The server has it, under a handle."""

    LOST = "lost"
    """The server no longer has it. It can be sent again if its source has not changed."""

    CLOSED = "closed"
    """Nobody wants it. What calls under way learn of it changes nothing."""


class Resident:
    """A tensor that the server keeps, or is to keep. Thread-safe.

    Attributes:
        spec: Its shape and element type.
        state: Where it is. See `ResidentState`.
        source: What it was made of; None if it was computed on the server, or is CLOSED.
        handle: Under which the server keeps it; None unless it is RESIDENT.
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
        """Whether nobody wants it."""
        return self.state is ResidentState.CLOSED

    def duplicate(self) -> Resident:
        """Return another that stands for the same tensor and outlives this one's end."""
        with _lock:
            other = Resident(self.spec, source=self.source, handle=self.handle)
            other.state = self.state
            return other

    def handle_for(self, session: bytes) -> ResidentHandle | None:
        """Return the handle that is good in a session, if there is one."""
        handle = self.handle
        return handle if handle is not None and handle.session == session else None

    def adopt(self, handle: ResidentHandle) -> None:
        """Take note that the server keeps it."""
        with _lock:
            if self.handle_for(handle.session) is None:
                self._move(ResidentState.RESIDENT, handle)

    def lose(self, handle: ResidentHandle) -> None:
        """Take note that the server does not know it by a handle."""
        with _lock:
            if self.handle is handle:
                self._move(ResidentState.LOST)

    def close(self) -> None:
        """Have the server drop it, once no call under way uses it."""
        with _lock:
            self._move(ResidentState.CLOSED)
            self.source = None

    def check_open(self, argument: str) -> None:
        """Raise InvalidArgumentError if it is closed."""
        if self.is_closed:
            raise InvalidArgumentError(
                f"{argument} must not be a RemoteTensor that is closed", argument=argument
            )

    def require_source(self, argument: str) -> SourceArray:
        """Return the source, which holds what the tensor holds.

        Raises:
            LostTensorError: There is none.
        """
        with _lock:
            state, source = self.state, self.source
        if source is not None and (state is ResidentState.UNSENT or source.is_unchanged):
            return source
        raise LostTensorError(
            f"{argument} is lost: the server no longer has it (it was started anew, or ran short of "
            f"memory), and {_loss_reason(state, source)}",
            argument=argument,
        )

    def _move(self, to: ResidentState, handle: ResidentHandle | None = None) -> None:
        """Change the state; CLOSED is for good. Called with the lock held."""
        if not self.is_closed:
            self.state, self.handle = to, handle


def _loss_reason(state: ResidentState, source: SourceArray | None) -> str:
    if state is ResidentState.CLOSED:
        return "it was closed during the call"
    if source is None:
        return "it was a result that existed there alone"
    return "the array that it was made of has been changed since"
