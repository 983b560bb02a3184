"""The interface of a transport, which carries calls to one server, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

from deconvd.direct.events import MethodCode
from deconvd.errors import UnavailableError
from deconvd.model.dtypes import Array
from deconvd.wire.stream_parts import Part, PartSource
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.transfer import Transfer

__all__ = [
    "NotServedDirectlyError",
    "OutcomeUnknownError",
    "StreamAttempt",
    "StripedAttempt",
    "TlsFailureError",
    "Transport",
]

_T = TypeVar("_T")


class NotServedDirectlyError(Exception):
    """The transport cannot carry a call, or could not carry it to its end. Another transport must carry it."""


class OutcomeUnknownError(NotServedDirectlyError):
    """A call was lost after it was sent: the server may have computed it, or may still do so."""


class TlsFailureError(UnavailableError):
    """Client and server do not agree on TLS, or on each other's certificates. A retry would fail alike."""


@dataclass(frozen=True, slots=True)
class StreamAttempt(Generic[_T]):
    """One attempt at a call of many parts.

    Attributes:
        method: The method of the service.
        parts: The parts of the request; the first is a message.
        receive: Reads the response, and returns the result of the call.
        response_type: The type of the response's messages.
        is_full_duplex: Whether the response may begin before the request has ended. It is sent meanwhile
            then.
    """

    method: MethodCode
    parts: Iterator[Part]
    receive: Callable[[PartSource], _T]
    response_type: type[Message]
    is_full_duplex: bool = False


@dataclass(frozen=True, slots=True)
class StripedAttempt:
    """One attempt at a striped call. See `deconvd.direct.protocol`.

    Attributes:
        method: The method of the service.
        request: The request message.
        operands: The operands that are sent, in the layout of `Tensor.raw`, in the order of `Operation.write_order`.
        results: Memory for the results that are returned, in the operation's order.
        transfer: Counts what travels, if not None.
    """

    method: MethodCode
    request: bytes
    operands: Sequence[Array]
    results: Sequence[Array]
    transfer: Transfer | None = None


class Transport(Protocol):
    """Carries calls to one server. Thread-safe.

    Its methods raise a DeconvdError, at the deadline or a moment later at the latest. A transport that does not carry
    all calls raises NotServedDirectlyError for those that another must carry.
    """

    @property
    def may_carry(self) -> bool:
        """Whether it may carry a call now; False if it is known that it cannot."""

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        overlapped_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger.

        Args:
            method: Its name in the schema.
            overlapped_copy: Puts operands where the request says that they are: before the call, or during it.
        """

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what `StreamAttempt.receive` returns, and the ledger.

        Args:
            begin: Begins an attempt. Called once for each transport that tries to carry the call.
        """
