"""The service by gRPC: behaviours as its handlers. See `serve` for how a call begins and ends.

Requests are parsed here rather than by gRPC, which would blame the server (INTERNAL) for garbage.
The server listens before there is a service, and gRPC takes no new handlers then: they are behind a `Gate`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from deconvd.chunks import ChunkSource, messages_of
from deconvd.codec import encode
from deconvd.errors import CallCancelledError, UnavailableError
from deconvd.parts import PartReader
from deconvd_server.behaviours import Behaviour, Held, Parts, Sink, Source, Stream, Unary
from deconvd_server.call import Call, Waiting, WaitsForClient
from deconvd_server.peers import counted_by_grpc
from deconvd_server.serve import Observer, Serving

__all__ = ["Gate"]

_Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"

_STARTING_RETRY_S: Final = 0.2
"""When a client may try again whether the devices are ready."""


class Gate(grpc.GenericRpcHandler):
    """What a gRPC server needs to serve a service. Until it is opened each method answers UNAVAILABLE.

    Args:
        service: Has the methods.
        observers: Hear of every call.
    """

    def __init__(self, service: ServiceDescriptor, observers: Sequence[Observer]) -> None:
        self._service_name = service.full_name
        self._observers = observers
        # sinks, whatever the methods are: they need read nothing to answer
        refusals = (Sink(GetMessageClass(m.input_type), _refuse) for m in service.methods)
        self.open({refusal.name: refusal for refusal in refusals})

    def open(self, behaviours: Mapping[str, Behaviour]) -> None:
        """Serve calls from now on with behaviours, by the names of the methods."""
        self._handlers = {
            f"/{self._service_name}/{name}": _handler(behaviour, self._observers)
            for name, behaviour in behaviours.items()
        }

    def service(self, call: grpc.HandlerCallDetails) -> _Handler | None:
        """Return what handles a call; None if there is no such method."""
        return self._handlers.get(call.method)


def _refuse(_reader: PartReader[Any], _call: Call) -> NoReturn:
    raise UnavailableError(
        "the server is starting: its device is not ready yet", retry_after_s=_STARTING_RETRY_S
    )


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
            reader = behaviour.reader(_source_of(messages, behaviour, call))
            response = behaviour.serve(reader, call).SerializeToString()
        _end(serving, context)
        return response

    return grpc.stream_unary_rpc_method_handler(handle)


def _stream(behaviour: Stream, observers: Sequence[Observer]) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        def respond(call: Call) -> Parts:
            return behaviour.serve(behaviour.reader(_source_of(messages, behaviour, call)), call)

        return _streamed(respond, behaviour, context, observers)

    return grpc.stream_stream_rpc_method_handler(handle)


def _held(behaviour: Held, observers: Sequence[Observer]) -> _Handler:
    def handle(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        decoded = (behaviour.decoded(data).message for data in _heard(messages, Waiting()))

        def hang_up() -> None:
            context.cancel()

        def respond(call: Call) -> Parts:
            return behaviour.serve(decoded, call, hang_up)

        return _streamed(respond, behaviour, context, observers)

    return grpc.stream_stream_rpc_method_handler(handle)


def _source_of(messages: Iterator[bytes], behaviour: Sink | Stream, call: Call) -> ChunkSource:
    return ChunkSource(_heard(messages, call.waiting), behaviour.request_type)


def _heard(messages: Iterator[bytes], waiting: WaitsForClient) -> Iterator[bytes]:
    """Yield a stream's messages; raise CallCancelledError once its caller has gone.

    gRPC keeps the error that it raises then, and the error keeps all frames that it passes through:
    with them what a call holds would stay until the garbage collector finds it.
    """
    try:
        waiting.waits_since_s = time.monotonic()
        for message in messages:
            waiting.waits_since_s = math.inf
            yield message
            waiting.waits_since_s = time.monotonic()
        waiting.waits_since_s = math.inf
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
            for message in messages_of(part):
                call.waiting.waits_since_s = time.monotonic()
                yield message
                call.waiting.waits_since_s = math.inf
    _end(serving, context)


def _serving(
    behaviour: Behaviour, context: grpc.ServicerContext, observers: Sequence[Observer]
) -> Serving:
    """Return what serves the call of a context, which ends with it."""
    peer = context.peer()
    call = Call(context.time_remaining(), peer, counted_by_grpc(peer))
    call.waiting, call.hang_up = Waiting(), partial(_hang_up, context)
    if not context.add_callback(call.cancel):
        call.cancel()  # it ended before we could ask to be told
    return Serving(behaviour.name, call, observers)


def _hang_up(context: grpc.ServicerContext) -> None:
    context.cancel()


def _end(serving: Serving, context: grpc.ServicerContext) -> None:
    """Let a call end with its ledger; end it now, by raising, if it has failed."""
    if serving.failure is not None:
        context.abort_with_status(rpc_status.to_status(serving.failure))
    context.set_trailing_metadata(serving.call.ledger.as_metadata())
