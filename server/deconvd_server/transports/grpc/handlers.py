"""The handlers of the service's methods by gRPC. `serve` says how a call begins and ends.

A call is given to a worker once its first message has come, so a call that sends none takes neither a thread nor a
place. The server listens before its devices are ready: until then the handlers refuse.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Final, TypeAlias

from google.protobuf.descriptor import ServiceDescriptor

from deconvd.errors import DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.wire.chunks import ChunkSource
from deconvd.wire.codec import encode
from deconvd.wire.status import status_from_error
from deconvd.wire.trace_context import TRACEPARENT, TRACESTATE
from deconvd_server.call.context import CallContext, CallerGoneError, ClientWaitState
from deconvd_server.resources.fair_shares import FairShares
from deconvd_server.resources.worker_threads import Workers
from deconvd_server.service.method import (
    BidiStreamingMethod,
    ClientStreamingMethod,
    Parts,
    RpcMethod,
    ServerStreamingMethod,
    SessionMethod,
    UnaryMethod,
)
from deconvd_server.transports.grpc.rpc import Rpc
from deconvd_server.transports.grpc.rpc_messages import RequestQueue, ResponseQueue
from deconvd_server.transports.grpc.session_rpc import SessionRpc
from deconvd_server.transports.observers import Observer
from deconvd_server.transports.serve import CallScope

__all__ = ["CALLS_COUNT", "GrpcService"]

CALLS_COUNT: Final = 160
"""How many calls by gRPC may be under way, without sessions. Each has a worker. They are more than may run on a device
or wait for it, so that calls which need no device are still served."""

_RESERVED_CALLS_COUNT: Final = 16
"""Of those, how many are for peers that have no call: one peer cannot take all."""

_REQUEST_ID_KEY: Final = "x-request-id"

_TRACE_KEYS: Final = frozenset({TRACEPARENT, TRACESTATE})

_STARTING: Final = UnavailableError(
    "the server is starting: its device is not ready yet", retry_after_s=0.2
)
_DRAINING: Final = UnavailableError("the server is draining: it takes no calls", retry_after_s=0.2)
_PREEMPTED: Final = UnavailableError(
    "the call has given way to another client's", retry_after_s=0.5
)

_Work: TypeAlias = Callable[[], None]


class GrpcService:
    """Serves the methods of a service. Until it is opened, and once it is closed, calls get UNAVAILABLE.

    The methods named with an underscore run in gRPC's thread, unless they say otherwise: they must not block.

    Attributes:
        handlers: The handlers by the methods' paths. See `Handlers`.

    Args:
        service: The service, whose methods it serves.
        workers: The threads that serve the calls.
        observers: They are told of every call.
    """

    def __init__(
        self, service: ServiceDescriptor, workers: Workers, observers: Sequence[Observer]
    ) -> None:
        self._workers = workers
        self._observers = observers
        self._methods: Mapping[str, RpcMethod] = {}
        self._refusal: DeconvdError | None = _STARTING
        self._shares = FairShares(CALLS_COUNT, _RESERVED_CALLS_COUNT, "calls by gRPC")
        self._awaiting_message: dict[Rpc, None] = {}
        self._running: dict[Rpc, None] = {}
        self._unanswered: list[Rpc] = []  # calls that came after `close` and before `refuse`
        self._is_refusing = False
        self._changed = threading.Condition()
        self._calls_count = 0
        self.handlers: dict[str, Callable[[Rpc], None]] = {
            f"/{service.full_name}/{method.name}": partial(self._accept, method.name)
            for method in service.methods
        }

    def open(self, methods: Mapping[str, RpcMethod]) -> None:
        """Serve calls from now on.

        Args:
            methods: The methods by their names.
        """
        self._methods = methods
        self._refusal = None

    def close(self) -> None:
        """Take no more calls. Calls that come from now on wait for `refuse`."""
        self._refusal = _DRAINING

    def refuse(self) -> None:
        """Refuse the calls that came since `close`, those that have sent no message yet, and all later ones."""
        self._is_refusing = True
        for rpc in [*self._unanswered, *self._awaiting_message]:
            rpc.fail(status_from_error(_DRAINING))

    def abort(self, error: DeconvdError) -> None:
        """End all calls with an error, even if their workers hang, and refuse later ones with it."""
        self._refusal = error
        failure = status_from_error(error)
        for rpc in [*self._running.copy(), *self._awaiting_message.copy()]:
            rpc.fail(failure)

    @property
    def calls_count(self) -> int:
        """How many calls are under way: their first message has come, and their answer has not left."""
        return self._calls_count

    def wait_until_ended(self, timeout_s: float, is_cut: Callable[[], bool]) -> bool:
        """Wait until no call is under way, the time is up, or `is_cut`; return whether no call is under way.

        Args:
            is_cut: Whether to wait no longer. It is asked whenever a call ends, and after `wake`.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._calls_count or is_cut(), timeout_s)
            return not self._calls_count

    def wake(self) -> None:
        """Have `wait_until_ended` ask again whether to wait no longer."""
        with self._changed:
            self._changed.notify_all()

    def _accept(self, name: str, rpc: Rpc) -> None:
        """Take a new call, and wait for its first message."""
        if self._refusal is not None:
            self._refuse(rpc, self._refusal)
            return
        self._awaiting_message[rpc] = None
        rpc.receive(partial(self._serve, name, rpc))

    def _refuse(self, rpc: Rpc, refusal: DeconvdError) -> None:
        """Refuse a call: at once while starting, and while draining only once `refuse` says so.

        A client that gets UNAVAILABLE stops calling here. Until then it may have other calls on their way, and calls
        that arrive once gRPC stops get CANCELLED, which clients need not retry.
        """
        if refusal is _DRAINING:
            self._unanswered.append(rpc)
            if not self._is_refusing:
                return
        rpc.fail(status_from_error(refusal))

    def _serve(self, name: str, rpc: Rpc, first: bytes | None) -> None:
        """Have a worker serve a call whose first message has come. `first` is None if the client sends none."""
        self._awaiting_message.pop(rpc, None)
        if rpc.has_ended:
            return
        if self._refusal is not None:
            self._refuse(rpc, self._refusal)
            return
        caller = rpc.caller
        call = CallContext(rpc.remaining_s, rpc.peer, caller.peer_key, caller.identity, "grpc")
        call.client_wait, call.close_stream = ClientWaitState(), rpc.cancel
        _note_metadata(rpc, call)
        self._count(1)
        self._running[rpc] = None
        rpc.on_close = partial(self._end_call, rpc, call)
        rpc.on_done = call.end
        method = self._methods[name]
        scope = CallScope(method.name, call, self._observers)
        try:
            if isinstance(method, SessionMethod):
                SessionRpc(method, rpc, scope, self._workers).begin(first)
            else:
                self._submit(method, first, rpc, scope)
        except UnavailableError as error:
            with scope:  # observers are told of it, too
                raise error
            _finish(rpc, scope)

    def _submit(
        self,
        method: UnaryMethod | ServerStreamingMethod | ClientStreamingMethod | BidiStreamingMethod,
        first: bytes | None,
        rpc: Rpc,
        scope: CallScope,
    ) -> None:
        call = scope.call
        place = self._shares.take(call.peer_key, partial(call.stop, _PREEMPTED))
        if isinstance(method, UnaryMethod):
            rpc.has_all_requests = True
            place.progressed_s = math.inf  # nothing is awaited of its caller
            work: _Work = partial(_serve_unary, method, first, rpc, scope)
        else:
            requests = RequestQueue(first, rpc, call, place)
            if isinstance(method, ClientStreamingMethod):
                work = partial(_serve_client_streaming, method, requests, rpc, scope)
            else:
                responses = ResponseQueue(rpc, call, place)
                work = partial(_serve_response_stream, method, requests, responses, rpc, scope)

        def end() -> None:
            place.free()
            call.end()

        def serve() -> None:
            try:
                work()
            finally:
                end()

        call.retain()  # a worker may still use the call's memory when the client has gone
        try:
            self._workers.submit(serve)
        except UnavailableError:
            end()
            raise

    def _end_call(self, rpc: Rpc, call: CallContext) -> None:
        """Note that the caller has gone, or has received its answer."""
        self._running.pop(rpc, None)
        self._count(-1)
        call.cancel()

    def _count(self, more_count: int) -> None:
        with self._changed:
            self._calls_count += more_count
            if not self._calls_count:
                self._changed.notify_all()


def _note_metadata(rpc: Rpc, call: CallContext) -> None:
    """Note what a call's metadata say about it for logs and traces. What its request says comes first."""
    trace: dict[str, str] = {}
    for key, value in rpc.metadata:
        if key == _REQUEST_ID_KEY:
            call.set_request_id(str(value))
        elif key in _TRACE_KEYS:
            # several headers of one name are one with commas, which no traceparent is
            trace[key] = f"{trace[key]},{value!s}" if key in trace else str(value)
    if trace:
        call.set_trace_context(trace.get(TRACEPARENT, ""), trace.get(TRACESTATE, ""))


def _serve_unary(method: UnaryMethod, data: bytes | None, rpc: Rpc, scope: CallScope) -> None:
    response = None
    with scope as call:
        call.check()  # it may have waited for a worker until its deadline
        if data is None:
            raise InvalidArgumentError("the call must have a request, got none")
        response = encode(method.serve(method.decode_request(data), call))
    _finish(rpc, scope, response)


def _serve_client_streaming(
    method: ClientStreamingMethod, requests: RequestQueue, rpc: Rpc, scope: CallScope
) -> None:
    response = None
    with scope as call:
        reader = method.reader(ChunkSource(iter(requests), method.request_type))
        response = method.serve(reader, call).SerializeToString()
    _finish(rpc, scope, response)


def _serve_response_stream(
    method: ServerStreamingMethod | BidiStreamingMethod,
    requests: RequestQueue,
    responses: ResponseQueue,
    rpc: Rpc,
    scope: CallScope,
) -> None:
    try:
        with scope as call, closing(_response_parts(method, requests, call)) as parts:
            responses.send_all(parts)
    except CallerGoneError:
        return  # nobody is left to be told
    _finish(rpc, scope)


def _response_parts(
    method: ServerStreamingMethod | BidiStreamingMethod,
    requests: RequestQueue,
    call: CallContext,
) -> Parts:
    """Return the parts of a response."""
    messages = iter(requests)
    if isinstance(method, ServerStreamingMethod):
        return method.serve(method.decode_request(next(messages, b"")), call)
    return method.serve(method.reader(ChunkSource(messages, method.request_type)), call)


def _finish(rpc: Rpc, scope: CallScope, response: bytes | None = None) -> None:
    """End a call with its answer and its ledger, or with its failure."""
    if scope.failure is not None:
        rpc.fail(scope.failure)
    else:
        rpc.finish(scope.call.ledger.as_metadata(), response)
