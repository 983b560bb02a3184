"""Every failure that a caller can meet, each with its gRPC status.

The class says what the caller can do about it, the message what was given and what is allowed. An error crosses the
wire whole (`deconvd.wire.status`): the client raises the class, message and details that the server raised.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "CallCancelledError",
    "DeadlineError",
    "DeconvdError",
    "ExhaustedError",
    "InternalError",
    "InvalidArgumentError",
    "LostSessionError",
    "LostTensorError",
    "NotFoundError",
    "StaleRegionError",
    "UnavailableError",
    "UnimplementedError",
]


class DeconvdError(Exception):
    """A call failed. The base of all errors here, and the class of a failure that has none of its own."""

    status: ClassVar[str] = "UNKNOWN"
    """Name of the `grpc.StatusCode` that stands for this class on the wire."""


class InvalidArgumentError(DeconvdError, ValueError):
    """An argument can never be accepted. Change it.

    Attributes:
        argument: Name of the argument at fault, as in `deconvolution_2d`; empty if there is no single one.
    """

    status = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class NotFoundError(DeconvdError, LookupError):
    """What the call names is not on the server, or no longer. Send it.

    Attributes:
        argument: Name of the argument that named it, as in `deconvolution_2d`; empty if it is not known.
    """

    status = "NOT_FOUND"
    resource: ClassVar[str] = ""
    """What kind of thing it is, for clients in other languages."""

    def __init__(self, message: str, *, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class StaleRegionError(NotFoundError):
    """The shared memory that a tensor lies in is not, or no longer, lent by this server."""

    resource = "shared memory"


class LostTensorError(NotFoundError):
    """The server does not keep the tensor, or no longer: it was dropped, or the server started anew."""

    resource = "tensor"


class LostSessionError(NotFoundError):
    """The session has ended, with all that was kept for it."""

    resource = "session"


class ExhaustedError(DeconvdError, MemoryError):
    """A limit on messages or memory was met. Send less, or raise the limit that the message names."""

    status = "RESOURCE_EXHAUSTED"


class UnavailableError(DeconvdError, ConnectionError):
    """The server cannot be reached, or takes no calls now. Try again.

    Attributes:
        retry_after_s: When the server hopes to take calls again, in seconds. None if it was not the
            server that said so: then it cannot be reached.
    """

    status = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def was_reached(self) -> bool:
        """Whether the server was reached, and has ended the call: if not, a connection broke."""
        return self.retry_after_s is not None


class DeadlineError(DeconvdError, TimeoutError):
    """The call took longer than its timeout, or surely would. Allow more time, or send less."""

    status = "DEADLINE_EXCEEDED"


class CallCancelledError(DeconvdError):
    """The caller gave the call up, or its connection was closed."""

    status = "CANCELLED"


class UnimplementedError(DeconvdError, NotImplementedError):
    """The server is too old, or lacks a part, for what was asked. Update it."""

    status = "UNIMPLEMENTED"


class InternalError(DeconvdError, RuntimeError):
    """A fault of the server, not of the call. Its log says more."""

    status = "INTERNAL"
