"""The errors that a call can raise, each with its gRPC status.

The class says what the caller can do. The message says what was given and what is allowed. An error crosses the wire
without loss (`deconvd.wire.status`): the client raises the same class, message and details as the server.
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
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
]


class DeconvdError(Exception):
    """A call failed. The base class of all errors.

    It is raised directly if the server returns a status that has no subclass.

    Attributes:
        request_id: The name of the call in the server's log: the one that the client has set, else one that the server
            has made. Empty if the server did not end the call.
    """

    request_id: str = ""

    status: ClassVar[str] = "UNKNOWN"
    """Name of the `grpc.StatusCode` of this class on the wire."""


class InvalidArgumentError(DeconvdError, ValueError):
    """An argument is invalid: the same call can never succeed. Change the argument.

    Attributes:
        argument: Name of the argument at fault, as in `deconvolution_2d`. Empty if it is not a single argument.
    """

    status = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class NotFoundError(DeconvdError, LookupError):
    """The server does not have, or no longer has, something that the call names. Send it again.

    Attributes:
        argument: Name of the argument that refers to the missing thing, as in `deconvolution_2d`. Empty if it is
            unknown.
    """

    status = "NOT_FOUND"
    resource: ClassVar[str] = ""
    """The kind of resource, for clients in other languages."""

    def __init__(self, message: str, *, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class StaleRegionError(NotFoundError):
    """A tensor is in shared memory that this server does not lend, or no longer lends."""

    resource = "shared memory"


class LostTensorError(NotFoundError):
    """The server does not have the tensor: it was dropped, or the server restarted."""

    resource = "tensor"


class LostSessionError(NotFoundError):
    """The session has ended, and its tensors have been dropped."""

    resource = "session"


class UnauthenticatedError(DeconvdError, PermissionError):
    """The server does not know who calls: credentials are missing, unknown or out of their time. Give valid ones."""

    status = "UNAUTHENTICATED"


class ExhaustedError(DeconvdError, MemoryError):
    """A limit on messages or memory was exceeded. Send less, or raise the limit that the message names."""

    status = "RESOURCE_EXHAUSTED"


class UnavailableError(DeconvdError, ConnectionError):
    """The server cannot be reached, or does not accept calls now. Try again.

    Attributes:
        retry_after_s: After how many seconds the server expects to accept calls again. None if the server was not
            reached.
    """

    status = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def was_reached(self) -> bool:
        """Whether the server itself ended the call. If not, it could not be reached, or the connection broke."""
        return self.retry_after_s is not None


class DeadlineError(DeconvdError, TimeoutError):
    """The call exceeded its timeout, or the server estimates that it would. Allow more time, or send less."""

    status = "DEADLINE_EXCEEDED"


class CallCancelledError(DeconvdError):
    """The caller cancelled the call, or closed its connection."""

    status = "CANCELLED"


class UnimplementedError(DeconvdError, NotImplementedError):
    """The server does not support this call, because it is too old or lacks an optional part. Update it."""

    status = "UNIMPLEMENTED"


class InternalError(DeconvdError, RuntimeError):
    """A fault of the server, not of the call. Its log says more."""

    status = "INTERNAL"
