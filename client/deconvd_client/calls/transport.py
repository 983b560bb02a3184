"""What a transport is: it carries calls to one server, each once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from google.protobuf.message import Message

from deconvd.direct.events import MethodCode
from deconvd.wire.stream_parts import Part, PartSource
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy

__all__ = ["NotServedDirectlyError", "OutcomeUnknownError", "StreamAttempt", "Transport"]

_T = TypeVar("_T")


class NotServedDirectlyError(Exception):
    """A transport has found that it cannot carry a call, or not to its end: the call is to be made in another way."""


class OutcomeUnknownError(NotServedDirectlyError):
    """It was lost while the server may have been at the call, and the server may be at it still."""


@dataclass(frozen=True, slots=True)
class StreamAttempt(Generic[_T]):
    """A call of many parts, to be made once.

    Attributes:
        parts: The request; the first is a message.
        receive: Makes something of the response.
        response_type: The type of its messages.
        at_once: Whether parts of the response may come before the request is whole: it is sent in a
            thread of its own then.
    """

    method: MethodCode
    parts: Iterator[Part]
    receive: Callable[[PartSource], _T]
    response_type: type[Message]
    is_full_duplex: bool = False


class Transport(Protocol):
    """Carries calls to one server. Thread-safe.

    Its methods raise a DeconvdError, by the deadline at the latest, or a moment later. One that is not
    for all calls raises NotServedDirectlyError for what another transport is to carry.
    """

    @property
    def may_carry(self) -> bool:
        """Whether it may carry a call now; False if it is known beforehand that it cannot."""

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        late_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger.

        Args:
            method: Its name in the schema.
            late_copy: Puts operands where the request says that they are: before the call is made, or meanwhile.
        """

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger.

        Args:
            begin: Begins the call, once for each transport that tries to carry it.
        """
