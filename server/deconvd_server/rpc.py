"""Behaviours as gRPC handlers: messages are decoded and encoded, errors become statuses, calls are tracked.

Requests are parsed here rather than by gRPC, which would blame the server (INTERNAL) for garbage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TypeAlias

import grpc
from grpc_status import rpc_status

from deconvd.chunks import ChunkSource, messages_of
from deconvd.codec import encode
from deconvd.errors import CallCancelledError, DeconvdError, InternalError
from deconvd.status import status_from_error
from deconvd_server.behaviours import Behaviour, Held, Parts, Sink, Source, Stream, Unary
from deconvd_server.call import Call
from deconvd_server.log_text import excerpt

__all__ = ["handler", "told"]

_Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"

_log = logging.getLogger(__name__)


def handler(behaviour: Behaviour) -> _Handler:
    """Return the gRPC handler of a behaviour."""
    match behaviour:
        case Unary():
            return _unary(behaviour)
        case Source():
            return _source(behaviour)
        case Sink():
            return _sink(behaviour)
        case Stream():
            return _stream(behaviour)
        case Held():
            return _held(behaviour)


def _unary(behaviour: Unary) -> _Handler:
    def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
        call = _begun(behaviour.name, context)
        try:
            response = encode(behaviour.serve(behaviour.decoded(data), call))
        except Exception as error:
            _end_with(error, behaviour.name, context)
            return b""  # which nobody gets
        context.set_trailing_metadata(call.ledger.as_metadata())
        return response

    return grpc.unary_unary_rpc_method_handler(handle)


def _source(behaviour: Source) -> _Handler:
    def handle(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        return _streamed(
            lambda call: behaviour.serve(behaviour.decoded(data), call), behaviour.name, context
        )

    return grpc.unary_stream_rpc_method_handler(handle)


def _sink(behaviour: Sink) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        def respond(call: Call) -> Parts:
            yield behaviour.serve(behaviour.reader(_source_of(messages, behaviour)), call)

        responses = list(_streamed(respond, behaviour.name, context))
        return responses[0] if responses else b""  # which nobody gets

    return grpc.stream_unary_rpc_method_handler(handle)


def _stream(behaviour: Stream) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return _streamed(
            lambda call: behaviour.serve(behaviour.reader(_source_of(messages, behaviour)), call),
            behaviour.name,
            context,
        )

    return grpc.stream_stream_rpc_method_handler(handle)


def _held(behaviour: Held) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        decoded = (behaviour.decoded(data).message for data in _heard(messages))

        def hang_up() -> None:
            context.cancel()

        return _streamed(
            lambda call: behaviour.serve(decoded, call, hang_up), behaviour.name, context
        )

    return grpc.stream_stream_rpc_method_handler(handle)


def _source_of(messages: Iterator[bytes], behaviour: Sink | Stream) -> ChunkSource:
    return ChunkSource(_heard(messages), behaviour.request_type)


def _heard(messages: Iterator[bytes]) -> Iterator[bytes]:
    """Yield a stream's messages; raise CallCancelledError once its caller has gone.

    gRPC keeps the error that it raises then, and the error keeps all frames that it passes through:
    with them what a call holds would stay until the garbage collector finds it.
    """
    try:
        yield from messages
    except Exception:
        raise CallCancelledError("the caller gave the call up") from None


def _streamed(
    respond: Callable[[Call], Parts], name: str, context: grpc.ServicerContext
) -> Iterator[bytes]:
    call = _begun(name, context)
    try:
        with closing(respond(call)) as parts:
            for part in parts:
                yield from messages_of(part)
    except Exception as error:
        _end_with(error, name, context)
        return
    context.set_trailing_metadata(call.ledger.as_metadata())


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
    status = status_from_error(told(error, name, context.peer()))
    context.abort_with_status(rpc_status.to_status(status))


def told(error: Exception, name: str, peer: str) -> DeconvdError:
    """Return what a caller is told of an error, which is logged.

    Args:
        name: Of the method.
    """
    if isinstance(error, DeconvdError):
        # that a caller goes is nothing to look into
        level = logging.INFO if isinstance(error, CallCancelledError) else logging.WARNING
        _log.log(level, "%s from %s: %s: %s", name, peer, error.status, excerpt(error))
        return error
    _log.error("%s from %s: unforeseen error", name, peer, exc_info=error)
    return InternalError("unforeseen error: see the server's log")
