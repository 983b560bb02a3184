"""Calls by gRPC. Its errors are translated into deconvd.errors here, and nowhere else in the client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
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
from deconvd_client.calls.responses import (
    MALFORMED_ERRORS,
    malformed_response,
    parse_response,
)
from deconvd_client.calls.tracing import current_call_span
from deconvd_client.calls.transport import StreamAttempt
from deconvd_client.transports.grpc.error_hints import ErrorHints
from deconvd_client.transports.grpc.rpcs import RpcChannel
from deconvd_client.transports.session_stream import SessionStream

__all__ = ["GrpcTransport"]

_T = TypeVar("_T")

_SERVICE_PATH: Final = f"/{pb.DESCRIPTOR.services_by_name['DeconvolutionService'].full_name}/"
_HEALTH_PATH: Final = "/grpc.health.v1.Health/Check"

_RPC_ERRORS: Final = (grpc.RpcError, ValueError, DeadlineError)
"""What the methods of `RpcChannel` raise."""


class GrpcTransport:
    """Carries calls by the RPCs of one channel. See `Transport`.

    Args:
        hints: Adds to gRPC's error messages what the user can do.
    """

    def __init__(self, rpcs: RpcChannel, hints: ErrorHints) -> None:
        self._rpcs = rpcs
        self._hints = hints
        self._is_closed = False

    @property
    def may_carry(self) -> bool:
        """Always True: it is the last resort."""
        return True

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        overlapped_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        """See `Transport`."""
        if overlapped_copy is not None:
            overlapped_copy.run()
        if (span := current_call_span.get()) is not None:
            span.is_direct = False
        try:
            response, metadata = self._rpcs.unary(_SERVICE_PATH + method, request, deadline)
        except _RPC_ERRORS as error:
            raise self._translate(error) from None
        return response, ledger_from_metadata(metadata)

    def stream(self, begin: Callable[[], StreamAttempt[_T]], deadline: Deadline) -> tuple[_T, str]:
        """See `Transport`."""
        attempt = begin()
        if (span := current_call_span.get()) is not None:
            span.is_direct = False
        # lazily: a message is taken once it can be sent, and only then are its elements copied
        messages = chain.from_iterable(map(part_messages, attempt.parts))

        def receive(responses: Iterator[bytes]) -> _T:
            try:
                return attempt.receive(ChunkSource(responses, attempt.response_type))
            except MALFORMED_ERRORS as error:
                raise malformed_response(attempt.response_type, error) from None

        try:
            path = _SERVICE_PATH + attempt.method.name
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
        status = parse_response(health_pb2.HealthCheckResponse, data).status
        names = health_pb2.HealthCheckResponse.ServingStatus
        if status not in names.values():
            raise malformed_response(health_pb2.HealthCheckResponse, f"its status is {status}")
        return names.Name(status)

    def close(self, deadline: Deadline) -> None:
        """Close the channel. Calls under way end with CallCancelledError.

        Args:
            deadline: When to return, even if the server no longer reads.
        """
        self._is_closed = True
        self._rpcs.close(deadline)

    def _translate(self, error: Exception) -> Exception:
        """Return the error to raise instead of one of gRPC's; other errors are returned as they are."""
        if isinstance(error, grpc.RpcError):
            # The error of a stream is the call object itself. Its traceback refers to frames that refer to it,
            # a cycle: the caller's arrays would stay in memory until the garbage collector finds it.
            error.__traceback__ = None
            return self._hints.explain(error_from_rpc(error))
        if isinstance(error, DeadlineError):
            return self._hints.explain(error)
        if self._is_closed and not isinstance(error, DeconvdError):
            return CallCancelledError(f"the connection is closed: {error}")
        return error
