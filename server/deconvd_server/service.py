"""The gRPC boundary: decodes requests, calls the engine, encodes results, translates errors. It computes nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

import deconvd
from deconvd.dtypes import ELEMENT_TYPES
from deconvd.errors import (
    DeconvdError,
    ExhaustedError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
)
from deconvd.gradients import Wanted
from deconvd.messages import geometry_from_message, options_from_message
from deconvd.problem import Problem
from deconvd.status import status_from_error
from deconvd.tensor import (
    Array,
    array_from_message,
    element_type_number,
    message_from_array,
    spec_from_message,
)
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.call import Call
from deconvd_server.engine import Engine, Engines

__all__ = ["SERVICE_NAME", "DeconvolutionService"]

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["DeconvolutionService"].full_name

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

_log = logging.getLogger(__name__)


class DeconvolutionService:
    """Serves `deconvd.v1.DeconvolutionService`. Until it has engines it answers UNAVAILABLE.

    Args:
        max_message_bytes: The largest request and the largest response.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max_message_bytes = max_message_bytes
        self.engines: Engines | None = None

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what a gRPC server needs to serve this.

        Requests are parsed here rather than by gRPC, which would answer garbage with INTERNAL.
        """
        return grpc.method_handlers_generic_handler(
            SERVICE_NAME,
            {
                "Deconvolve": _unary(pb.DeconvolveRequest, self.deconvolve),
                "DeconvolveGrad": _unary(pb.DeconvolveGradRequest, self.deconvolve_grad),
                "GetServerInfo": _unary(pb.GetServerInfoRequest, self.get_server_info),
            },
        )

    def deconvolve(self, request: pb.DeconvolveRequest, call: Call) -> pb.DeconvolveResponse:
        """Serve Deconvolve."""
        problem = _problem(request.x, request.w, request.geometry)
        x = array_from_message("x", request.x)
        W = array_from_message("W", request.w)
        b = None
        if request.HasField("b"):
            problem.check_b(spec_from_message("b", request.b))
            b = array_from_message("b", request.b)
        self._check_result_size(problem.y.nbytes)
        options = options_from_message(request.options)
        y = self._ready_engines().least_loaded().deconvolve(problem, x, W, b, options, call)
        return pb.DeconvolveResponse(y=message_from_array(y))

    def deconvolve_grad(
        self, request: pb.DeconvolveGradRequest, call: Call
    ) -> pb.DeconvolveGradResponse:
        """Serve DeconvolveGrad."""
        wanted = Wanted(gx=request.wanted.gx, gW=request.wanted.gw, gb=request.wanted.gb)
        problem = _problem(request.x, request.w, request.geometry)
        x = array_from_message("x", request.x) if wanted.gW else None
        W = array_from_message("W", request.w) if wanted.gx else None
        problem.check_gy(spec_from_message("gy", request.gy))
        gy = array_from_message("gy", request.gy)
        self._check_result_size(
            wanted.gx * problem.x.nbytes
            + wanted.gW * problem.W.nbytes
            + wanted.gb * problem.b.nbytes
        )
        options = options_from_message(request.options)
        engine = self._ready_engines().least_loaded()
        gradients = engine.gradients(problem, x, W, gy, wanted, options, call)
        return pb.DeconvolveGradResponse(
            gx=_optional_message(gradients.gx),
            gw=_optional_message(gradients.gW),
            gb=_optional_message(gradients.gb),
        )

    def get_server_info(
        self, _request: pb.GetServerInfoRequest, _call: Call
    ) -> pb.GetServerInfoResponse:
        """Serve GetServerInfo."""
        return pb.GetServerInfoResponse(
            version=deconvd.__version__,
            devices=[_device_message(engine) for engine in self._ready_engines().all],
            element_types=[element_type_number(dtype) for dtype in ELEMENT_TYPES],
            limits=pb.Limits(message_bytes=self._max_message_bytes),
        )

    def _ready_engines(self) -> Engines:
        if self.engines is None:
            raise UnavailableError("the server is starting: its device is not ready yet")
        return self.engines

    def _check_result_size(self, result_bytes: int) -> None:
        """Refuse a result that could not be sent, before it is computed."""
        if result_bytes + _FRAMING_BYTES > self._max_message_bytes:
            raise ExhaustedError(
                f"the result would have {result_bytes} bytes, and the server sends messages of at "
                f"most {self._max_message_bytes}: send fewer samples at a time, or start it with a "
                "larger --max-message-bytes"
            )


_FRAMING_BYTES = 1024
"""More than the fields of a response take beside its tensors' elements."""


def _unary(
    request_type: type[_Request], behaviour: Callable[[_Request, Call], _Response]
) -> grpc.RpcMethodHandler[bytes, bytes]:
    """Return a handler that parses the request and runs `behaviour` on it."""

    def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
        with _errors_as_status(request_type, context):
            request = _parsed(request_type, data)
            return behaviour(request, _call_of(context)).SerializeToString()
        raise AssertionError("unreachable: abort raises")

    return grpc.unary_unary_rpc_method_handler(handle)


@contextmanager
def _errors_as_status(request_type: type[Message], context: grpc.ServicerContext) -> Iterator[None]:
    """End the call with the status of whatever the block raises, and log which call failed."""
    name = request_type.DESCRIPTOR.name.removesuffix("Request")
    _log.debug("%s from %s: begun", name, context.peer())
    try:
        yield
    except DeconvdError as error:
        _log.warning("%s from %s: %s: %s", name, context.peer(), error.status, error)
        context.abort_with_status(status_from_error(error))
    except Exception:
        _log.exception("%s from %s: unforeseen error", name, context.peer())
        unforeseen = InternalError("unforeseen error: see the server's log")
        context.abort_with_status(status_from_error(unforeseen))


def _problem(x: pb.Tensor, w: pb.Tensor, geometry: pb.Geometry) -> Problem:
    return Problem(
        spec_from_message("x", x), spec_from_message("W", w), geometry_from_message(geometry)
    )


def _parsed(request_type: type[_Request], data: bytes) -> _Request:
    try:
        return request_type.FromString(data)
    except DecodeError:
        raise InvalidArgumentError(
            f"the request is not a valid {request_type.DESCRIPTOR.full_name} message"
        ) from None


def _call_of(context: grpc.ServicerContext) -> Call:
    call = Call(timeout_s=context.time_remaining())
    if not context.add_callback(call.cancel):
        call.cancel()  # it ended before we could ask to be told
    return call


def _device_message(engine: Engine) -> pb.Device:
    info, load = engine.info, engine.load
    return pb.Device(
        id=info.id,
        name=info.name,
        memory_bytes=info.memory_bytes,
        threads_count=info.threads_count,
        budget_bytes=info.budget_bytes,
        used_bytes=load.used_bytes,
        running_calls_count=load.running_count,
        waiting_calls_count=load.waiting_count,
        caches=[pb.Cache(**asdict(cache)) for cache in engine.caches],
    )


def _optional_message(array: Array | None) -> pb.Tensor | None:
    return None if array is None else message_from_array(array)
