"""The service by gRPC: behaviours as its handlers. See `serve` for how a call begins and ends.

Calls are served by workers once their first message has come: one that sends none takes neither a thread nor a place.
The server listens before there is a service, and its handlers are made then: they are behind a `Gate`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Final, TypeAlias

from google.protobuf.descriptor import ServiceDescriptor

from deconvd.errors import DeadlineError, DeconvdError, InvalidArgumentError, UnavailableError
from deconvd.wire.chunks import ChunkSource
from deconvd.wire.codec import encode
from deconvd.wire.status import status_from_error
from deconvd_server.call.context import STALL_LIMIT_S, CallContext, CallerGoneError, ClientWaitState
from deconvd_server.resources.fair_shares import FairShares
from deconvd_server.resources.peer_keys import peer_key_of_grpc
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
from deconvd_server.transports.grpc.rpc import CallLater, Rpc
from deconvd_server.transports.grpc.rpc_messages import RequestQueue, ResponseQueue
from deconvd_server.transports.grpc.session_rpc import SessionRpc
from deconvd_server.transports.observers import Observer
from deconvd_server.transports.serve import CallScope

__all__ = ["CALLS_COUNT", "GrpcService"]

CALLS_COUNT: Final = 160
"""How many calls by gRPC may be under way, each with a worker, sessions aside: more than run and wait for a device, so
that those which need none are served, too."""

_RESERVED_CALLS_COUNT: Final = 16

_FIRST_MESSAGE_S: Final = 60.0
"""How long a call may be without its first message: enough for a large one over a slow network."""

_LARGE_BYTES: Final = 1 << 20
_SLOWEST_BYTES_PER_S: Final = 1e6
"""How fast an answer of more than a mebibyte has to leave, as over a line of 8 Mbit/s, after as long as any call may
stall. gRPC does not tell how much of one has. Until then it has a part of its peer's memory; small ones have little."""

_POLL_PERIOD_S: Final = 1.0
"""How often calls are looked for that are without it for longer."""

_STARTING: Final = UnavailableError(
    "the server is starting: its device is not ready yet", retry_after_s=0.2
)
_DRAINING: Final = UnavailableError("the server is draining: it takes no calls", retry_after_s=0.2)
_NO_MESSAGE: Final = DeadlineError(f"the call has sent no message for {_FIRST_MESSAGE_S:g} s")
_PREEMPTED: Final = UnavailableError(
    "the call has given way to another client's", retry_after_s=0.5
)

_Work: TypeAlias = Callable[[], None]


class GrpcService:
    """What serves a service's methods. Until it is opened, and once it is closed, they answer UNAVAILABLE.

    Attributes:
        handlers: By the methods' paths; see `Handlers`.

    Args:
        service: Has the methods.
        workers: Serve the calls.
        observers: Hear of every call.
    """

    def __init__(
        self, service: ServiceDescriptor, workers: Workers, observers: Sequence[Observer]
    ) -> None:
        self._workers = workers
        self._observers = observers
        self._methods: Mapping[str, RpcMethod] = {}
        self._refusal: DeconvdError | None = _STARTING
        self._shares = FairShares(CALLS_COUNT, _RESERVED_CALLS_COUNT, "calls by gRPC")
        self._awaiting_message: dict[Rpc, float] = {}  # since when they are there, the oldest first
        self._unanswered: list[Rpc] = []  # came once it was closed
        self._is_refusing = False
        self._changed = threading.Condition()
        self._calls_count = 0
        self.handlers: dict[str, Callable[[Rpc], None]] = {
            f"/{service.full_name}/{method.name}": partial(self._accept, method.name)
            for method in service.methods
        }

    def open(self, behaviours: Mapping[str, RpcMethod]) -> None:
        """Serve calls from now on with behaviours, by the names of the methods."""
        self._methods = behaviours
        self._refusal = None

    def close(self) -> None:
        """Take no more calls. Those that come are kept waiting for `refuse`."""
        self._refusal = _DRAINING

    def refuse(self) -> None:
        """Refuse the calls that have come since it was closed, all that come, and those without a message."""
        self._is_refusing = True
        for rpc in [*self._unanswered, *self._awaiting_message]:
            rpc.fail(status_from_error(_DRAINING))

    @property
    def calls_count(self) -> int:
        """Calls under way: whose first message has come, and whose answer has not left."""
        return self._calls_count

    def wait_until_ended(self, timeout_s: float, is_cut: Callable[[], bool]) -> bool:
        """Return once no call is under way, or enough is enough; and whether none is."""
        with self._changed:
            self._changed.wait_for(lambda: not self._calls_count or is_cut(), timeout_s)
            return not self._calls_count

    def wake(self) -> None:
        """Wake who waits, to look whether enough is enough."""
        with self._changed:
            self._changed.notify_all()

    def expire(self, later: CallLater) -> None:
        """End calls that have been without a message for long, now and from now on. For gRPC's thread."""
        until_s = time.monotonic() - _FIRST_MESSAGE_S
        for rpc, since_s in list(self._awaiting_message.items()):
            if since_s > until_s:
                break
            rpc.fail(status_from_error(_NO_MESSAGE))
        later(_POLL_PERIOD_S, partial(self.expire, later))

    def _accept(self, name: str, rpc: Rpc) -> None:
        """Wait for a call's first message."""
        if self._refusal is not None:
            self._refuse(rpc, self._refusal)
            return
        self._awaiting_message[rpc] = time.monotonic()
        rpc.receive(partial(self._serve, name, rpc))

    def _refuse(self, rpc: Rpc, refusal: DeconvdError) -> None:
        if refusal is _DRAINING:
            self._unanswered.append(rpc)
            if not self._is_refusing:
                return
        rpc.fail(status_from_error(refusal))

    def _serve(self, name: str, rpc: Rpc, first: bytes | None) -> None:
        """Have a worker serve a call, whose first message has come."""
        self._awaiting_message.pop(rpc, None)
        if rpc.has_ended:
            return
        if self._refusal is not None:
            self._refuse(rpc, self._refusal)
            return
        call = CallContext(rpc.remaining_s, rpc.peer, peer_key_of_grpc(rpc.peer))
        call.client_wait, call.close_stream = ClientWaitState(), rpc.cancel
        self._count(1)
        rpc.on_close = partial(self._end_call, call)
        rpc.on_done = call.end
        behaviour = self._methods[name]
        serving = CallScope(behaviour.name, call, self._observers)
        try:
            if isinstance(behaviour, SessionMethod):
                SessionRpc(behaviour, rpc, serving, self._workers).begin(first)
            else:
                self._submit(behaviour, first, rpc, serving)
        except UnavailableError as error:
            rpc.fail(status_from_error(error))

    def _submit(
        self,
        behaviour: UnaryMethod
        | ServerStreamingMethod
        | ClientStreamingMethod
        | BidiStreamingMethod,
        first: bytes | None,
        rpc: Rpc,
        serving: CallScope,
    ) -> None:
        call = serving.call
        place = self._shares.take(call.peer_key, partial(call.stop, _PREEMPTED))
        if isinstance(behaviour, UnaryMethod):
            rpc.has_all_requests = True
            place.progressed_s = math.inf  # nothing is awaited of its caller
            work: _Work = partial(_serve_unary, behaviour, first, rpc, serving)
        else:
            requests = RequestQueue(first, rpc, call, place)
            if isinstance(behaviour, ClientStreamingMethod):
                work = partial(_serve_client_streaming, behaviour, requests, rpc, serving)
            else:
                responses = ResponseQueue(rpc, call, place)
                work = partial(_serve_response_stream, behaviour, requests, responses, rpc, serving)

        def end() -> None:
            place.free()
            call.end()

        def serve() -> None:
            try:
                work()
            finally:
                end()

        call.retain()  # a worker may outlast the call
        try:
            self._workers.submit(serve)
        except UnavailableError:
            end()
            raise

    def _end_call(self, call: CallContext) -> None:
        """Note that a call's caller has gone, or has its answer."""
        self._count(-1)
        call.cancel()

    def _count(self, more_count: int) -> None:
        with self._changed:
            self._calls_count += more_count
            if not self._calls_count:
                self._changed.notify_all()


def _serve_unary(behaviour: UnaryMethod, data: bytes | None, rpc: Rpc, serving: CallScope) -> None:
    response = None
    with serving as call:
        call.check()  # it may have waited for a worker
        if data is None:
            raise InvalidArgumentError("the call must have a request, got none")
        response = encode(behaviour.serve(behaviour.decode_request(data), call))
    _finish(rpc, serving, response)


def _serve_client_streaming(
    behaviour: ClientStreamingMethod, requests: RequestQueue, rpc: Rpc, serving: CallScope
) -> None:
    response = None
    with serving as call:
        reader = behaviour.reader(ChunkSource(iter(requests), behaviour.request_type))
        response = behaviour.serve(reader, call).SerializeToString()
    _finish(rpc, serving, response)


def _serve_response_stream(
    behaviour: ServerStreamingMethod | BidiStreamingMethod,
    requests: RequestQueue,
    responses: ResponseQueue,
    rpc: Rpc,
    serving: CallScope,
) -> None:
    try:
        with serving as call, closing(_response_parts(behaviour, requests, call)) as parts:
            responses.send_all(parts)
    except CallerGoneError:
        return  # nobody is there to be told
    _finish(rpc, serving)


def _response_parts(
    behaviour: ServerStreamingMethod | BidiStreamingMethod,
    requests: RequestQueue,
    call: CallContext,
) -> Parts:
    """Return the parts of a response."""
    messages = iter(requests)
    if isinstance(behaviour, ServerStreamingMethod):
        return behaviour.serve(behaviour.decode_request(next(messages, b"")), call)
    return behaviour.serve(behaviour.reader(ChunkSource(messages, behaviour.request_type)), call)


def _finish(rpc: Rpc, serving: CallScope, response: bytes | None = None) -> None:
    """Let a call end with its ledger, or with its failure."""
    if serving.failure is not None:
        rpc.fail(serving.failure)
        return
    rpc.finish(serving.call.ledger.as_metadata(), response)
    if response is not None and len(response) > _LARGE_BYTES:
        rpc.call_later(STALL_LIMIT_S + len(response) / _SLOWEST_BYTES_PER_S, rpc.cancel)
