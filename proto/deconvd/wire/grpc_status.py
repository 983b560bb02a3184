"""The error of a failed gRPC call. See `deconvd.wire.status`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from deconvd.errors import DeconvdError
from deconvd.wire.status import error_from_status

__all__ = ["error_from_rpc"]

_DETAILS_KEY: Final = "grpc-status-details-bin"


def error_from_rpc(failure: grpc.RpcError) -> DeconvdError:
    """Return the error of a failed call.

    An error that a deconvd server raised is restored completely. For errors of gRPC and of proxies, the status code
    decides the class.
    """
    # the errors that a channel raises are also calls, but gRPC's types do not say so
    call = cast("grpc.Call", failure)
    status = status_pb2.Status(
        code=call.code().value[0], message=call.details() or "", details=_details_of(call)
    )
    return error_from_status(status)


def _details_of(call: grpc.Call) -> Sequence[any_pb2.Any]:
    """Return a call's google.rpc details. Empty if they cannot be parsed, because a deconvd server did not send them.

    Unlike rpc_status.from_call, this accepts details whose status code a proxy has changed.
    """
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                return ()
            details: Sequence[any_pb2.Any] = status.details
            return details
    return ()
