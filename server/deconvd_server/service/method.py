"""RPC methods, independent of their transport: `transports.grpc` and `transports.direct` both serve them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol, TypeAlias

from google.protobuf.message import DecodeError, Message

from deconvd.errors import InvalidArgumentError
from deconvd.host.buffer_pool import BufferPool
from deconvd.host.malloc import LARGE_BYTES
from deconvd.wire.codec import Envelope, decode
from deconvd.wire.stream_parts import Part, PartReader, PartSource
from deconvd_server.call.context import CallContext
from deconvd_server.device.arriving import ArrivalProgress
from deconvd_server.resources.budgets import budgets
from deconvd_server.service.striped_elements import StripedElements

__all__ = [
    "BidiStreamingMethod",
    "ClientStreamingMethod",
    "OverlappedRequest",
    "Parts",
    "RpcMethod",
    "ServerStreamingMethod",
    "SessionHandler",
    "SessionMethod",
    "UnaryMethod",
    "idle_operand_bytes",
]

Parts: TypeAlias = Generator[Part, None, None]
"""The parts of a response. A reader that does not want the rest must close it."""

_OPERAND_POOL: Final = BufferPool(budgets().pool_bytes, smallest_bytes=LARGE_BYTES)
"""Memory for operands of streams that are too large for the allocator to keep, such as a large W.

Streams for a device with memory of its own read into that device's host arrays instead.
"""


def idle_operand_bytes() -> int:
    """Return how much memory is kept for the next operands of streams."""
    return _OPERAND_POOL.idle_bytes


class OverlappedRequest(Envelope[Any]):
    """A request whose operands in shared memory are still arriving.

    Attributes:
        progress: How many of their bytes have arrived, counted over all of them in the order of
            `Operation.write_order`.
    """

    progress: ArrivalProgress

    @classmethod
    def of(cls, request: Envelope[Any], progress: ArrivalProgress) -> OverlappedRequest:
        overlapped = cls(*request)
        overlapped.progress = progress
        return overlapped


@dataclass(frozen=True)
class _MethodBase:
    """What all kinds of methods have in common.

    Attributes:
        request_type: The type of its request, or of each message of its requests.
    """

    request_type: type[Message]

    @cached_property
    def name(self) -> str:
        """The method's name."""
        return self.request_type.DESCRIPTOR.name.removesuffix("Request")

    def decode_request(self, data: bytes) -> Envelope[Any]:
        """Return the request that bytes encode. Raises InvalidArgumentError if they encode none."""
        try:
            return decode(self.request_type, data)
        except DecodeError:
            raise InvalidArgumentError(
                f"the request is not a valid {self.request_type.DESCRIPTOR.full_name} message"
            ) from None

    def reader(self, source: PartSource) -> PartReader[Any]:
        """Return a reader of a stream of requests."""
        return PartReader(source, self.request_type, _OPERAND_POOL.empty)


StripedHandler: TypeAlias = Callable[
    [Envelope[Any], StripedElements, Callable[[Envelope[Any]], None], CallContext], None
]
"""See `UnaryMethod.serve_striped`. Its third argument sends the response."""


@dataclass(frozen=True)
class UnaryMethod(_MethodBase):
    """One request, one response.

    Attributes:
        serve_striped: Serves a call whose elements travel by several connections, apart from the request and the
            response; None if the method has no such elements. It sends the response itself, by the function that it
            gets, while elements are still leaving.
    """

    serve: Callable[[Envelope[Any], CallContext], Envelope[Any]]
    serve_striped: StripedHandler | None = None


@dataclass(frozen=True)
class ServerStreamingMethod(_MethodBase):
    """One request, a stream of responses."""

    serve: Callable[[Envelope[Any], CallContext], Parts]


@dataclass(frozen=True)
class ClientStreamingMethod(_MethodBase):
    """A stream of requests, one response."""

    serve: Callable[[PartReader[Any], CallContext], Message]


@dataclass(frozen=True)
class BidiStreamingMethod(_MethodBase):
    """A stream of requests, a stream of responses."""

    serve: Callable[[PartReader[Any], CallContext], Parts]


class SessionHandler(Protocol):
    """Handles a session call from its first message on."""

    @property
    def response(self) -> Message:
        """The response to the first message."""

    def handle(self, message: Any) -> None:
        """Handle a later message."""

    def end(self) -> None:
        """End the session: its caller has closed the call in good order."""


@dataclass(frozen=True)
class SessionMethod(_MethodBase):
    """A call that stays open for long, without a thread of its own.

    Attributes:
        serve: Gets the first message, the call, which is cancelled if the stream breaks, and a function that closes
            the stream from any thread.
    """

    serve: Callable[[Any, CallContext, Callable[[], None]], SessionHandler]


RpcMethod: TypeAlias = (
    UnaryMethod
    | ServerStreamingMethod
    | ClientStreamingMethod
    | BidiStreamingMethod
    | SessionMethod
)
