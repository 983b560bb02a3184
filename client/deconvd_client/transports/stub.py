"""The service's methods as functions: each is called once, until its deadline, and raises errors of deconvd.errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import numpy as np

from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Envelope, decode, encode
from deconvd.wire.messages import messages_for
from deconvd.wire.tensor import array_from_message
from deconvd_client.calls.call_spec import CallResult, CallSpec
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.transport import StreamAttempt, Transport
from deconvd_client.transports.direct.connectors import Connector
from deconvd_client.transports.direct.pool import DirectTransport
from deconvd_client.transports.failover import Failover
from deconvd_client.transports.grpc.transport import GrpcTransport
from deconvd_client.transports.session_stream import SessionStream

__all__ = ["Stub"]

_T = TypeVar("_T")

_SERVER_INFO_TIMEOUT_S: Final = 5.0
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

    def __init__(self, target: str, by_grpc: GrpcTransport, way: Connector | None) -> None:
        self.target = target
        self._grpc = by_grpc
        self.direct: DirectTransport | None = (
            None if way is None else DirectTransport(way, self._fetch_server_info)
        )
        self._transport: Transport = by_grpc
        self._at_most_once_transport: Transport = by_grpc
        if self.direct is not None:
            self._transport = Failover(self.direct, by_grpc)
            self._at_most_once_transport = Failover(self.direct, by_grpc, only_unsent=True)

    def call(
        self,
        asked: CallSpec,
        request: Envelope[Any],
        *,
        placed: Mapping[str, Array],
        late_copy: OverlappedCopy | None = None,
        is_brief: bool,
    ) -> CallResult:
        """Have an operation computed by a call of one message.

        Args:
            request: What goes to the server: `asked.request`, and where its tensors are.
            placed: Memory for results that the request wants to have there.
            late_copy: Puts operands where the request says that they are: meanwhile, if the call is direct.
            is_brief: Whether request and response are small enough for a direct call.

        Raises:
            OutcomeUnknownError: The server may be writing to `placed`: the call is to be made anew, with other memory.
        """
        brief = self._at_most_once_transport if placed else self._transport
        transport = brief if is_brief else self._grpc
        operation = asked.operation
        data, ledger = transport.unary(operation.name, encode(request), asked.deadline, late_copy)
        response: Envelope[Any] = decode(messages_for(operation).response, data)
        arrays = {field: _result(response, field, placed.get(field)) for field in asked.results}
        return CallResult(response.message, arrays, ledger)

    def stream(
        self,
        begin: Callable[[], StreamAttempt[_T]],
        deadline: Deadline,
        *,
        is_placed: bool = False,
    ) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger.

        Args:
            begin: Called once for each attempt: again, if a direct line was lost.
            is_placed: Whether the server is to write the result into memory of ours.

        Raises:
            OutcomeUnknownError: It may be writing there: the call is to be made anew, with other memory.
        """
        return (self._at_most_once_transport if is_placed else self._transport).stream(
            begin, deadline
        )

    @property
    def is_direct(self) -> bool:
        """Whether calls are likely to be made directly, streams too."""
        return self.direct is not None and self.direct.may_connect

    def drop_tensors(self, request: pb.DropTensorsRequest, deadline: Deadline) -> None:
        """Call DropTensors."""
        self._grpc.unary("DropTensors", request.SerializeToString(), deadline)

    def hold_session(self, opening: pb.HoldSessionRequest, deadline: Deadline) -> SessionStream:
        """Call HoldSession, and return once the server has answered the first message."""
        return self._grpc.hold_session(opening, deadline)

    def get_server_info(self, deadline: Deadline, session: bytes = b"") -> pb.GetServerInfoResponse:
        """Call GetServerInfo."""
        request = pb.GetServerInfoRequest(session=session).SerializeToString()
        response, _ = self._grpc.unary("GetServerInfo", request, deadline)
        return pb.GetServerInfoResponse.FromString(response)

    def health(self, deadline: Deadline) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        return self._grpc.health(deadline)

    def close(self, deadline: Deadline) -> None:
        """Close the connections. Calls under way end with CallCancelledError.

        Args:
            deadline: When to return, although the other end takes nothing any more.
        """
        if self.direct is not None:
            self.direct.close()
        self._grpc.close(deadline)

    def _fetch_server_info(self) -> pb.GetServerInfoResponse:
        return self.get_server_info(Deadline(_SERVER_INFO_TIMEOUT_S))


def _result(response: Envelope[Any], field: str, placed: Array | None) -> Array:
    """Return a result from where the response says that it is: as an array of the caller's own, or `placed`."""
    message: pb.Tensor = getattr(response.message, field)
    if placed is not None and message.WhichOneof("payload") == "shared":
        return placed
    return np.array(array_from_message(ARGUMENTS[field], message, response.raw.get(field)))
