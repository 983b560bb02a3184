"""Functions as gRPC handlers: messages are decoded and encoded, errors become statuses, calls are tracked.

Requests are parsed here rather than by gRPC, which would blame the server (INTERNAL) for garbage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from deconvd.chunks import ChunkReader
from deconvd.codec import Envelope, decode, encode
from deconvd.errors import CallCancelledError, DeconvdError, InternalError, InvalidArgumentError
from deconvd.status import status_from_error
from deconvd_server.call import Call

__all__ = [
    "decoded",
    "held_handler",
    "sink_handler",
    "source_handler",
    "stream_handler",
    "told",
    "unary_handler",
]

_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)

_Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"

_log = logging.getLogger(__name__)


def unary_handler(
    request_type: type[_Request],
    behaviour: Callable[[Envelope[_Request], Call], Envelope[_Response]],
) -> _Handler:
    """Return a handler that gives a request to `behaviour` and sends what it returns."""
    name = _name(request_type)

    def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
        call = _begun(name, context)
        try:
            response = encode(behaviour(decoded(request_type, data), call))
        except Exception as error:
            _end_with(error, name, context)
            return b""  # which nobody gets
        context.set_trailing_metadata(call.ledger.as_metadata())
        return response

    return grpc.unary_unary_rpc_method_handler(handle)


def stream_handler(
    part_type: type[_Request], behaviour: Callable[[ChunkReader[_Request], Call], Iterator[bytes]]
) -> _Handler:
    """Return a handler that gives a stream to `behaviour` and sends the messages that it yields."""

    def handle(parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return _streamed(
            lambda call: behaviour(ChunkReader(_heard(parts), part_type), call),
            _name(part_type),
            context,
        )

    return grpc.stream_stream_rpc_method_handler(handle)


def source_handler(
    request_type: type[_Request],
    behaviour: Callable[[Envelope[_Request], Call], Iterator[bytes]],
) -> _Handler:
    """Return a handler that gives a request to `behaviour` and sends the messages that it yields."""

    def handle(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        return _streamed(
            lambda call: behaviour(decoded(request_type, data), call), _name(request_type), context
        )

    return grpc.unary_stream_rpc_method_handler(handle)


def sink_handler(
    part_type: type[_Request], behaviour: Callable[[ChunkReader[_Request], Call], Message]
) -> _Handler:
    """Return a handler that gives a stream to `behaviour` and sends the message that it returns."""

    def handle(parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        def respond(call: Call) -> Iterator[bytes]:
            yield behaviour(ChunkReader(_heard(parts), part_type), call).SerializeToString()

        responses = list(_streamed(respond, _name(part_type), context))
        return responses[0] if responses else b""  # which nobody gets

    return grpc.stream_unary_rpc_method_handler(handle)


def held_handler(
    part_type: type[_Request],
    behaviour: Callable[[Iterator[_Request], Call, Callable[[], None]], Iterator[bytes]],
) -> _Handler:
    """Return a handler for a stream that is open for long.

    It gives `behaviour` the messages that come, and what ends the stream, and sends those that it
    yields.
    """

    def handle(parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        messages = (decoded(part_type, data).message for data in _heard(parts))

        def hang_up() -> None:
            context.cancel()

        return _streamed(lambda call: behaviour(messages, call, hang_up), _name(part_type), context)

    return grpc.stream_stream_rpc_method_handler(handle)


def _heard(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield a stream's messages; raise CallCancelledError once its caller has gone.

    gRPC keeps the error that it raises then, and the error keeps all frames that it passes through:
    with them what a call holds would stay until the garbage collector finds it.
    """
    try:
        yield from parts
    except Exception:
        raise CallCancelledError("the caller gave the call up") from None


def _streamed(
    behaviour: Callable[[Call], Iterator[bytes]], name: str, context: grpc.ServicerContext
) -> Iterator[bytes]:
    call = _begun(name, context)
    try:
        yield from behaviour(call)
    except Exception as error:
        _end_with(error, name, context)
        return
    context.set_trailing_metadata(call.ledger.as_metadata())


def _name(request_type: type[Message]) -> str:
    return request_type.DESCRIPTOR.name.removesuffix("Request")


def _begun(name: str, context: grpc.ServicerContext) -> Call:
    """Return the call of a context, which ends with it."""
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("%s from %s: begun", name, context.peer())
    call = Call(timeout_s=context.time_remaining())
    if not context.add_callback(call.cancel):
        call.cancel()  # it ended before we could ask to be told
    return call


def _end_with(error: Exception, name: str, context: grpc.ServicerContext) -> None:
    """End the call with the status of an error, which raises; return if its caller has gone anyway."""
    if not isinstance(error, DeconvdError) and not context.is_active():
        _log.info("%s from %s: the caller has gone", name, context.peer())
        return
    context.abort_with_status(status_from_error(told(error, name, context.peer())))


def told(error: Exception, name: str, peer: str) -> DeconvdError:
    """Return what a caller is told of an error, which is logged.

    Args:
        name: Of the method.
    """
    if isinstance(error, DeconvdError):
        # that a caller goes is nothing to look into
        level = logging.INFO if isinstance(error, CallCancelledError) else logging.WARNING
        _log.log(level, "%s from %s: %s: %s", name, peer, error.status, error)
        return error
    _log.error("%s from %s: unforeseen error", name, peer, exc_info=error)
    return InternalError("unforeseen error: see the server's log")


def decoded(request_type: type[_Request], data: bytes) -> Envelope[_Request]:
    """Return the message that bytes hold. Raises InvalidArgumentError if they hold none."""
    try:
        return decode(request_type, data)
    except DecodeError:
        raise InvalidArgumentError(
            f"the request is not a valid {request_type.DESCRIPTOR.full_name} message"
        ) from None
