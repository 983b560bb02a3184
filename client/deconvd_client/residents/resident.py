"""One tensor on the server, and what it takes to send it again."""

from __future__ import annotations

from enum import Enum
from typing import Final

from deconvd.errors import InvalidArgumentError, LostTensorError
from deconvd.host.forks import new_reentrant_lock
from deconvd.model.problem import TensorSpec
from deconvd_client.residents.session import Handle
from deconvd_client.residents.source_array import Source

__all__ = ["Kept", "KeptState"]

_lock: Final = new_reentrant_lock()
"""For the transitions of all tensors. A caller's finalizer may close one in the midst of another's transition."""


class KeptState(Enum):
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


class Kept:
    """A tensor that the server keeps, or is to keep. Thread-safe.

    Attributes:
        spec: Its shape and element type.
        state: Where it is. See `KeptState`.
        source: What it was made of; None if it was computed on the server, or is CLOSED.
        handle: Under which the server keeps it; None unless it is RESIDENT.
    """

    def __init__(
        self, spec: TensorSpec, *, source: Source | None = None, handle: Handle | None = None
    ) -> None:
        self.spec = spec
        self.source = source
        self.handle = handle
        self.state = KeptState.UNSENT if handle is None else KeptState.RESIDENT

    @property
    def is_closed(self) -> bool:
        """Whether nobody wants it."""
        return self.state is KeptState.CLOSED

    def shared(self) -> Kept:
        """Return another that stands for the same tensor and outlives this one's end."""
        with _lock:
            other = Kept(self.spec, source=self.source, handle=self.handle)
            other.state = self.state
            return other

    def handle_in(self, session: bytes) -> Handle | None:
        """Return the handle that is good in a session, if there is one."""
        handle = self.handle
        return handle if handle is not None and handle.session == session else None

    def adopt(self, handle: Handle) -> None:
        """Take note that the server keeps it."""
        with _lock:
            if self.handle_in(handle.session) is None:
                self._move(KeptState.RESIDENT, handle)

    def lose(self, handle: Handle) -> None:
        """Take note that the server does not know it by a handle."""
        with _lock:
            if self.handle is handle:
                self._move(KeptState.LOST)

    def close(self) -> None:
        """Have the server drop it, once no call under way uses it."""
        with _lock:
            self._move(KeptState.CLOSED)
            self.source = None

    def check_open(self, argument: str) -> None:
        """Raise InvalidArgumentError if it is closed."""
        if self.is_closed:
            raise InvalidArgumentError(
                f"{argument} must not be a RemoteTensor that is closed", argument=argument
            )

    def source_unchanged(self, argument: str) -> Source:
        """Return the source, which holds what the tensor holds.

        Raises:
            LostTensorError: There is none.
        """
        with _lock:
            state, source = self.state, self.source
        if source is not None and (state is KeptState.UNSENT or source.is_unchanged):
            return source
        raise LostTensorError(
            f"{argument} is lost: the server no longer has it (it was started anew, or ran short of "
            f"memory), and {_why_not_again(state, source)}",
            argument=argument,
        )

    def _move(self, to: KeptState, handle: Handle | None = None) -> None:
        """Change the state; CLOSED is for good. Called with the lock held."""
        if not self.is_closed:
            self.state, self.handle = to, handle


def _why_not_again(state: KeptState, source: Source | None) -> str:
    if state is KeptState.CLOSED:
        return "it was closed during the call"
    if source is None:
        return "it was a result that existed there alone"
    return "the array that it was made of has been changed since"
