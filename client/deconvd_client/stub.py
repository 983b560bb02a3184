"""The service's methods as functions: each is called once, until its deadline, and raises errors of deconvd.errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import numpy as np

from deconvd.codec import Envelope, decode, encode
from deconvd.messages import messages_for
from deconvd.operation import ARGUMENTS
from deconvd.tensor import Array, array_from_message
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.asked import Answered, Asked
from deconvd_client.deadline import Deadline
from deconvd_client.direct import DirectTransport
from deconvd_client.direct_ways import Way
from deconvd_client.grpc_transport import GrpcTransport
from deconvd_client.hold import Hold
from deconvd_client.late_copy import LateCopy
from deconvd_client.transport import Conversation, LostLineError, NoLineError, Transport

__all__ = ["Failover", "Stub"]

_T = TypeVar("_T")

_ASK_S: Final = 5.0
"""How long a server may take to say where it takes direct calls: calls go by gRPC meanwhile."""


class Stub:
    """The methods of the server at one target.

    What is small, and what streams, goes directly where that can be; gRPC carries the rest.

    Args:
        target: Where that is.
        by_grpc: Carries what nothing else does.
        way: How calls can be made directly; None if they are not to be.

    Attributes:
        direct: The direct connections, if there may be any.
    """

    def __init__(self, target: str, by_grpc: GrpcTransport, way: Way | None) -> None:
        self.target: str = target
        self._by_grpc = by_grpc
        self.direct: DirectTransport | None = (
            None if way is None else DirectTransport(way, self._told_by_server)
        )
        self._by_any: Transport = by_grpc
        self._by_one: Transport = by_grpc
        if self.direct is not None:
            self._by_any = Failover(self.direct, by_grpc)
            self._by_one = Failover(self.direct, by_grpc, only_unsent=True)

    def call(
        self,
        asked: Asked,
        request: Envelope[Any],
        *,
        placed: Mapping[str, Array],
        late_copy: LateCopy | None = None,
        is_brief: bool,
    ) -> Answered:
        """Have an operation computed by a call of one message.

        Args:
            request: What goes to the server: `asked.request`, and where its tensors are.
            placed: Memory for results that the request wants to have there.
            late_copy: Puts operands where the request says that they are: meanwhile, if the call is direct.
            is_brief: Whether request and response are small enough for a direct call.

        Raises:
            LostLineError: The server may be writing to `placed`: the call is to be made anew, with other memory.
        """
        brief = self._by_one if placed else self._by_any
        transport = brief if is_brief else self._by_grpc
        operation = asked.operation
        data, ledger = transport.unary(operation.name, encode(request), asked.deadline, late_copy)
        response: Envelope[Any] = decode(messages_for(operation).response, data)
        arrays = {field: _result(response, field, placed.get(field)) for field in asked.results}
        return Answered(response.message, arrays, ledger)

    def stream(
        self,
        begin: Callable[[], Conversation[_T]],
        deadline: Deadline,
        *,
        is_placed: bool = False,
    ) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger.

        Args:
            begin: Called once for each attempt: again, if a direct line was lost.
            is_placed: Whether the server is to write the result into memory of ours.

        Raises:
            LostLineError: It may be writing there: the call is to be made anew, with other memory.
        """
        return (self._by_one if is_placed else self._by_any).stream(begin, deadline)

    @property
    def is_direct(self) -> bool:
        """Whether calls are likely to be made directly, streams too."""
        return self.direct is not None and self.direct.is_worth_asking

    def drop_tensors(self, request: pb.DropTensorsRequest, deadline: Deadline) -> None:
        """Call DropTensors."""
        self._by_grpc.unary("DropTensors", request.SerializeToString(), deadline)

    def hold_session(self, opening: pb.HoldSessionRequest, deadline: Deadline) -> Hold:
        """Call HoldSession, and return once the server has answered the first message."""
        return self._by_grpc.hold_session(opening, deadline)

    def get_server_info(self, deadline: Deadline, session: bytes = b"") -> pb.GetServerInfoResponse:
        """Call GetServerInfo."""
        request = pb.GetServerInfoRequest(session=session).SerializeToString()
        response, _ = self._by_grpc.unary("GetServerInfo", request, deadline)
        return pb.GetServerInfoResponse.FromString(response)

    def health(self, deadline: Deadline) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        return self._by_grpc.health(deadline)

    def close(self, deadline: Deadline) -> None:
        """Close the connections. Calls under way end with CallCancelledError.

        Args:
            deadline: When to return, although the other end takes nothing any more.
        """
        if self.direct is not None:
            self.direct.close()
        self._by_grpc.close(deadline)

    def _told_by_server(self) -> pb.GetServerInfoResponse:
        return self.get_server_info(Deadline(_ASK_S))


def _result(response: Envelope[Any], field: str, placed: Array | None) -> Array:
    """Return a result from where the response says that it is: as an array of the caller's own, or `placed`."""
    message: pb.Tensor = getattr(response.message, field)
    if placed is not None and message.WhichOneof("payload") == "shared":
        return placed
    return np.array(array_from_message(ARGUMENTS[field], message, response.raw.get(field)))


class Failover:
    """Has calls carried by one transport if it may carry them, else by another. See `Transport`.

    The other carries what the first finds that it cannot carry, too.

    Both have the same deadline: what the first has used of it the second lacks.

    Args:
        only_unsent: Raise LostLineError, and leave to the caller what the first has lost in the midst: the server
            may be at it still, and write into memory of ours what the other would have written there too.
    """

    def __init__(self, first: Transport, second: Transport, *, only_unsent: bool = False) -> None:
        self._first = first
        self._second = second
        self._only_unsent = only_unsent

    @property
    def may_carry(self) -> bool:
        """Whether either may."""
        return self._first.may_carry or self._second.may_carry

    def unary(
        self, method: str, request: bytes, deadline: Deadline, late_copy: LateCopy | None = None
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger."""
        if self._first.may_carry:
            try:
                return self._first.unary(method, request, deadline, late_copy)
            except LostLineError:
                if self._only_unsent:
                    raise
            except NoLineError:
                pass
        return self._second.unary(method, request, deadline, late_copy)

    def stream(self, begin: Callable[[], Conversation[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger."""
        if self._first.may_carry:
            try:
                return self._first.stream(begin, deadline)
            except LostLineError:
                if self._only_unsent:
                    raise
            except NoLineError:
                pass
        return self._second.stream(begin, deadline)
