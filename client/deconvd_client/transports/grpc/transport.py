"""Calls by gRPC, and the place where its errors become ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import grpc
from grpc_health.v1 import health_pb2

from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.chunks import ChunkSource, part_messages
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.ledger import ledger_from_metadata
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.transport import StreamAttempt
from deconvd_client.transports.grpc.error_hints import ErrorHints
from deconvd_client.transports.grpc.rpcs import RpcChannel
from deconvd_client.transports.session_stream import SessionStream

__all__ = ["GrpcTransport"]

_T = TypeVar("_T")

_SERVICE_PATH: Final = f"/{pb.DESCRIPTOR.services_by_name['DeconvolutionService'].full_name}/"
_HEALTH_PATH: Final = "/grpc.health.v1.Health/Check"

_RPC_ERRORS: Final = (grpc.RpcError, ValueError, DeadlineError)
"""What `Rpcs` raises."""


class GrpcTransport:
    """Carries calls by the RPCs of one channel. See `Transport`.

    Args:
        advice: What errors say beside gRPC's own words.
    """

    def __init__(self, rpcs: RpcChannel, advice: ErrorHints) -> None:
        self._rpcs = rpcs
        self._advice = advice
        self._is_closed = False

    @property
    def may_carry(self) -> bool:
        """Always: what it cannot carry nothing can."""
        return True

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        late_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """Return the response to a call of one message, and its ledger."""
        if late_copy is not None:
            late_copy.run()
        try:
            response, metadata = self._rpcs.unary(_SERVICE_PATH + method, request, deadline)
        except _RPC_ERRORS as error:
            raise self._translate(error) from None
        return response, ledger_from_metadata(metadata)

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """Make a call of many parts; return what is made of the response, and the ledger."""
        talk = begin()
        messages = (message for part in talk.parts for message in part_messages(part))

        def receive(responses: Iterator[bytes]) -> _T:
            return talk.receive(ChunkSource(responses, talk.response_type))

        try:
            path = _SERVICE_PATH + talk.method.name
            received, metadata = self._rpcs.stream(path, messages, receive, deadline)
        except _RPC_ERRORS as error:
            raise self._translate(error) from None
        return received, ledger_from_metadata(metadata)

    def hold_session(self, opening: pb.HoldSessionRequest, deadline: Deadline) -> SessionStream:
        """Begin a call of HoldSession, and return once the server has answered the first message."""
        try:
            return self._rpcs.open_session(f"{_SERVICE_PATH}HoldSession", opening, deadline)
        except _RPC_ERRORS as error:
            raise self._translate(error) from None

    def health(self, deadline: Deadline) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        request = health_pb2.HealthCheckRequest().SerializeToString()
        try:
            data, _ = self._rpcs.unary(_HEALTH_PATH, request, deadline)
        except _RPC_ERRORS as error:
            raise self._translate(error) from None
        response = health_pb2.HealthCheckResponse.FromString(data)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def close(self, deadline: Deadline) -> None:
        """Close the channel. Calls under way end with CallCancelledError.

        Args:
            deadline: When to return, although the other end takes nothing any more.
        """
        self._is_closed = True
        self._rpcs.close(deadline)

    def _translate(self, error: Exception) -> Exception:
        """Return the error of ours that an error of gRPC's stands for, and any other as it is."""
        if isinstance(error, grpc.RpcError):
            # A stream's is the call itself, which frames hold that the error would hold: the caller's
            # arrays would stay until the garbage collector finds them.
            error.__traceback__ = None
            return self._advice.explain(error_from_rpc(error))
        if isinstance(error, DeadlineError):
            return self._advice.explain(error)
        if self._is_closed and not isinstance(error, DeconvdError):
            return CallCancelledError(f"the connection is closed: {error}")
        return error
