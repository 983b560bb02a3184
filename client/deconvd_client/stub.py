"""The service's RPCs as functions: each has a deadline, and raises errors of deconvd.errors."""

from __future__ import annotations

import re
from typing import Final, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from deconvd.errors import CallCancelledError, DeconvdError, ExhaustedError
from deconvd.status import error_from_rpc
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc

__all__ = ["Stub"]

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

_TOO_LARGE: Final = re.compile(
    r"(CLIENT|SERVER): Received message larger than max \((\d+) vs\. (\d+)\)"
)


class Stub:
    """The RPCs of one channel, each with the same timeout.

    Every method raises a DeconvdError; see `deconvd.errors`.
    """

    def __init__(self, channel: grpc.Channel, *, timeout_s: float) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._service = pb_grpc.DeconvolutionServiceStub(channel)
        self._check_health: grpc.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def deconvolve(self, request: pb.DeconvolveRequest) -> pb.DeconvolveResponse:
        """Call Deconvolve."""
        return self._call(self._service.Deconvolve, request)

    def deconvolve_grad(self, request: pb.DeconvolveGradRequest) -> pb.DeconvolveGradResponse:
        """Call DeconvolveGrad."""
        return self._call(self._service.DeconvolveGrad, request)

    def get_server_info(self) -> pb.GetServerInfoResponse:
        """Call GetServerInfo."""
        return self._call(self._service.GetServerInfo, pb.GetServerInfoRequest())

    def health(self) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        response = self._call(self._check_health, health_pb2.HealthCheckRequest())
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def close(self) -> None:
        """Close the channel. Calls under way end with CallCancelledError."""
        self._channel.close()

    def _call(
        self,
        rpc: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
    ) -> _Response:
        try:
            return rpc(request, timeout=self._timeout_s)
        except grpc.RpcError as failure:
            # every RpcError of a channel is its Call too, which the types do not say
            raise _with_advice(error_from_rpc(cast("grpc.Call", failure))) from None
        except ValueError as error:  # grpcio's way to say that the channel was closed
            raise CallCancelledError(f"the connection is closed: {error}") from None


def _with_advice(error: DeconvdError) -> DeconvdError:
    """Say which option to change, where gRPC's own message does not."""
    too_large = _TOO_LARGE.search(str(error))
    if too_large is None:
        return error
    receiver, size, limit = too_large.groups()
    if receiver == "CLIENT":
        return ExhaustedError(
            f"the response has {size} bytes, and this client takes {limit}: raise max_message_bytes "
            "of connect(), or send fewer samples at a time"
        )
    return ExhaustedError(
        f"the request has {size} bytes, and the server takes {limit}: start it with a larger "
        "--max-message-bytes, or send fewer samples at a time"
    )
