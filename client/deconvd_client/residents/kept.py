"""One tensor on the server, and what it takes to send it again."""

from __future__ import annotations

from deconvd.errors import InvalidArgumentError, LostTensorError
from deconvd.problem import TensorSpec
from deconvd_client.residents.session import Handle
from deconvd_client.residents.source import Source

__all__ = ["Kept"]


class Kept:
    """A tensor that the server keeps, or is to keep. Thread-safe.

        UNSENT --adopted--> RESIDENT --lost--> LOST --adopted--> RESIDENT
        any of them --closed--> CLOSED

    Attributes:
        spec: Its shape and element type.
        source: What it was made of; None if it was computed on the server.
        handle: Under which the server keeps it; None unless it is RESIDENT.
        is_unsent: Whether the server has never had it.
    """

    def __init__(
        self, spec: TensorSpec, *, source: Source | None = None, handle: Handle | None = None
    ) -> None:
        self.spec = spec
        self.source = source
        self.handle = handle
        self.is_unsent = handle is None
        self.is_closed = False

    def shared(self) -> Kept:
        """Return another that stands for the same tensor and outlives this one's end."""
        other = Kept(self.spec, source=self.source, handle=self.handle)
        other.is_unsent = self.is_unsent
        return other

    def handle_in(self, session: bytes) -> Handle | None:
        """Return the handle that is good in a session, if there is one."""
        handle = self.handle
        return handle if handle is not None and handle.session == session else None

    def adopt(self, handle: Handle) -> None:
        """Take note that the server keeps it."""
        if not self.is_closed and self.handle_in(handle.session) is None:
            self.handle = handle
        self.is_unsent = False

    def lose(self, handle: Handle) -> None:
        """Take note that the server does not know it by a handle."""
        if self.handle is handle:
            self.handle = None

    def close(self) -> None:
        """Have the server drop it, once no call under way uses it."""
        self.is_closed = True
        self.handle = None
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
        source = self.source
        if source is not None and (self.is_unsent or source.is_unchanged):
            return source
        why = (
            "it was a result that existed there alone"
            if source is None
            else "the array that it was made of has been changed since"
        )
        raise LostTensorError(
            f"{argument} is lost: the server no longer has it (it was started anew, or ran short of "
            f"memory), and {why}",
            argument=argument,
        )
