"""The service by gRPC: behaviours as its handlers. See `serve` for what is served.

Requests are parsed here rather than by gRPC, which would blame the server (INTERNAL) for garbage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypeAlias

import grpc
from grpc_status import rpc_status

from deconvd.chunks import ChunkSource, messages_of
from deconvd.codec import encode
from deconvd.errors import CallCancelledError
from deconvd_server.behaviours import Behaviour, Held, Parts, Sink, Source, Stream, Unary
from deconvd_server.call import Call
from deconvd_server.serve import Observer, Serving

__all__ = ["handler"]

_Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"


def handler(
    service_name: str, behaviours: Mapping[str, Behaviour], observers: Sequence[Observer]
) -> grpc.GenericRpcHandler:
    """Return what a gRPC server needs to serve a service.

    Args:
        service_name: In full.
        behaviours: What serves each method, by its name.
        observers: Hear of every call.
    """
    handlers = {name: _handler(behaviour, observers) for name, behaviour in behaviours.items()}
    return grpc.method_handlers_generic_handler(service_name, handlers)


def _handler(behaviour: Behaviour, observers: Sequence[Observer]) -> _Handler:
    match behaviour:
        case Unary():
            return _unary(behaviour, observers)
        case Source():
            return _source(behaviour, observers)
        case Sink():
            return _sink(behaviour, observers)
        case Stream():
            return _stream(behaviour, observers)
        case Held():
            return _held(behaviour, observers)


def _unary(behaviour: Unary, observers: Sequence[Observer]) -> _Handler:
    def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
        serving = _serving(behaviour, context, observers)
        with serving as call:
            response = encode(behaviour.serve(behaviour.decoded(data), call))
        _end(serving, context)
        return response

    return grpc.unary_unary_rpc_method_handler(handle)


def _source(behaviour: Source, observers: Sequence[Observer]) -> _Handler:
    def handle(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        def respond(call: Call) -> Parts:
            return behaviour.serve(behaviour.decoded(data), call)

        return _streamed(respond, behaviour, context, observers)

    return grpc.unary_stream_rpc_method_handler(handle)


def _sink(behaviour: Sink, observers: Sequence[Observer]) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        serving = _serving(behaviour, context, observers)
        with serving as call:
            reader = behaviour.reader(_source_of(messages, behaviour))
            response = behaviour.serve(reader, call).SerializeToString()
        _end(serving, context)
        return response

    return grpc.stream_unary_rpc_method_handler(handle)


def _stream(behaviour: Stream, observers: Sequence[Observer]) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        def respond(call: Call) -> Parts:
            return behaviour.serve(behaviour.reader(_source_of(messages, behaviour)), call)

        return _streamed(respond, behaviour, context, observers)

    return grpc.stream_stream_rpc_method_handler(handle)


def _held(behaviour: Held, observers: Sequence[Observer]) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        decoded = (behaviour.decoded(data).message for data in _heard(messages))

        def hang_up() -> None:
            context.cancel()

        def respond(call: Call) -> Parts:
            return behaviour.serve(decoded, call, hang_up)

        return _streamed(respond, behaviour, context, observers)

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
    respond: Callable[[Call], Parts],
    behaviour: Behaviour,
    context: grpc.ServicerContext,
    observers: Sequence[Observer],
) -> Iterator[bytes]:
    serving = _serving(behaviour, context, observers)
    with serving as call, closing(respond(call)) as parts:
        for part in parts:
            yield from messages_of(part)
    _end(serving, context)


def _serving(
    behaviour: Behaviour, context: grpc.ServicerContext, observers: Sequence[Observer]
) -> Serving:
    """Return what serves the call of a context, which ends with it."""
    serving = Serving(behaviour.name, context.peer(), context.time_remaining(), observers)
    if not context.add_callback(serving.call.cancel):
        serving.call.cancel()  # it ended before we could ask to be told
    return serving


def _end(serving: Serving, context: grpc.ServicerContext) -> None:
    """Let a call end with its ledger; end it now, by raising, if it has failed."""
    if serving.failure is not None:
        context.abort_with_status(rpc_status.to_status(serving.failure))
    context.set_trailing_metadata(serving.call.ledger.as_metadata())
