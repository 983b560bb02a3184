"""The service's RPCs as functions: each has a deadline, and raises errors of deconvd.errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from deconvd.array_memory import ArrayMemory
from deconvd.chunks import ChunkSource, messages_of
from deconvd.codec import Envelope, decode, encode
from deconvd.direct import FrameSource, Method
from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError
from deconvd.ledger import FOLLOW_ENTRY, METADATA_KEY, ledger_from_metadata
from deconvd.parts import Part, PartReader, PartSource
from deconvd.status import error_from_rpc
from deconvd.trials import Trials
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.advice import Advice
from deconvd_client.direct import Conversation, DirectLines, NoLineError
from deconvd_client.direct_ways import Way
from deconvd_client.hold import Hold
from deconvd_client.late_copy import LateCopy
from deconvd_client.retries import with_retries

__all__ = ["Attempt", "Stub"]

_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Returned = TypeVar("_Returned", covariant=True)

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]

_CLOSE_S: Final = 1.0
"""How long closing may take where the other end takes nothing any more."""

_KEPT_BYTES: Final = 256 << 20
"""Memory of dropped results that is kept for the next ones: fresh memory costs more than a copy into it."""


class Attempt(Protocol[_Response, _Returned]):
    """One attempt at a call in a stream."""

    @property
    def at_once(self) -> bool:
        """Whether parts of the response may come before the request is whole."""

    def parts(self) -> Iterator[Part]:
        """Yield the request's parts; another thread takes them."""

    def receive(self, reader: PartReader[_Response]) -> _Returned:
        """Return what is made of the response."""


class Stub:
    """The RPCs of one channel, each with the same timeout.

    Every method raises a DeconvdError; see `deconvd.errors`.

    Args:
        way: How calls can be made directly; None if they are not to be. Those that cannot are made
            by gRPC.
        advice: What errors say beside gRPC's own words.
    """

    def __init__(
        self, channel: grpc.Channel, *, timeout_s: float, way: Way | None, advice: Advice
    ) -> None:
        self._channel = channel
        self._advice = advice
        self._direct = None if way is None else DirectLines(way, self.get_server_info)
        self._timeout_s = timeout_s
        self._closed = False
        self._ended = threading.local()
        self._results = ArrayMemory(_KEPT_BYTES)
        self._early_calls = Trials()
        self._deconvolve = self._unary("Deconvolve", pb.DeconvolveResponse, Method.Deconvolve)
        self._deconvolve_grad = self._unary(
            "DeconvolveGrad", pb.DeconvolveGradResponse, Method.DeconvolveGrad
        )
        self._get_server_info = self._unary("GetServerInfo", pb.GetServerInfoResponse)
        self._deconvolve_stream = self._stream("DeconvolveStream")
        self._deconvolve_grad_stream = self._stream("DeconvolveGradStream")
        self._drop_tensors = self._unary("DropTensors", pb.DropTensorsResponse)
        self._hold_session = self._stream("HoldSession")
        self._put_tensor: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
            _path("PutTensor")
        )
        self._get_tensor: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            _path("GetTensor")
        )
        self._check_health: grpc.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def deconvolve(
        self,
        request: Envelope[pb.DeconvolveRequest],
        *,
        is_brief: bool = False,
        late_copy: LateCopy | None = None,
    ) -> Envelope[pb.DeconvolveResponse]:
        """Call Deconvolve.

        Args:
            is_brief: Whether request and response are small enough for a direct call.
            late_copy: Puts operands where the request says that they are: meanwhile, if the call is direct.
        """
        return self._deconvolve(request, is_brief=is_brief, late_copy=late_copy)

    def deconvolve_grad(
        self,
        request: Envelope[pb.DeconvolveGradRequest],
        *,
        is_brief: bool = False,
        late_copy: LateCopy | None = None,
    ) -> Envelope[pb.DeconvolveGradResponse]:
        """Call DeconvolveGrad, in the manner of `deconvolve`."""
        return self._deconvolve_grad(request, is_brief=is_brief, late_copy=late_copy)

    @property
    def is_direct(self) -> bool:
        """Whether calls are likely to be made directly, streams too."""
        return self._direct is not None and self._direct.is_worth_asking

    def deconvolve_stream(
        self, begin: Callable[[], Attempt[pb.DeconvolveStreamResponse, _T]]
    ) -> _T:
        """Call DeconvolveStream and return what is made of the response.

        Args:
            begin: Called once for each attempt.
        """
        return self._streamed(
            Method.DeconvolveStream, self._deconvolve_stream, begin, pb.DeconvolveStreamResponse
        )

    def deconvolve_grad_stream(
        self, begin: Callable[[], Attempt[pb.DeconvolveGradStreamResponse, _T]]
    ) -> _T:
        """Call DeconvolveGradStream, in the manner of `deconvolve_stream`."""
        return self._streamed(
            Method.DeconvolveGradStream,
            self._deconvolve_grad_stream,
            begin,
            pb.DeconvolveGradStreamResponse,
        )

    def put_tensor(self, parts: Callable[[], Iterator[Part]]) -> pb.PutTensorResponse:
        """Call PutTensor.

        Args:
            parts: Returns the request's parts; called once for each attempt.
        """

        def directly(direct: DirectLines, timeout_s: float) -> tuple[pb.PutTensorResponse, str]:
            talk = Conversation(Method.PutTensor, parts(), _only_message, pb.PutTensorResponse)
            return direct.converse(talk, timeout_s)

        def by_grpc(timeout_s: float) -> pb.PutTensorResponse:
            messages = (message for part in parts() for message in messages_of(part))
            return pb.PutTensorResponse.FromString(self._put_tensor(messages, timeout=timeout_s))

        return self._made(directly, by_grpc)

    def get_tensor(
        self,
        request: pb.GetTensorRequest,
        receive: Callable[[PartReader[pb.GetTensorResponse]], _T],
    ) -> _T:
        """Call GetTensor and return what `receive`, called once for each attempt, makes of the response."""

        def directly(direct: DirectLines, timeout_s: float) -> tuple[_T, str]:
            talk = Conversation(
                Method.GetTensor,
                iter([request]),
                lambda source: receive(self._reader(source, pb.GetTensorResponse)),
                pb.GetTensorResponse,
            )
            return direct.converse(talk, timeout_s)

        def by_grpc(timeout_s: float) -> _T:
            responses = self._get_tensor(request.SerializeToString(), timeout=timeout_s)
            try:
                source = ChunkSource(responses, pb.GetTensorResponse)
                return receive(self._reader(source, pb.GetTensorResponse))
            finally:
                responses.cancel()

        return self._made(directly, by_grpc)

    def drop_tensors(self, request: pb.DropTensorsRequest) -> None:
        """Call DropTensors."""
        self._drop_tensors(Envelope(request, {}))

    def hold_session(self, opening: pb.HoldSessionRequest, timeout_s: float | None) -> Hold:
        """Call HoldSession, and return once the server has answered the first message.

        Args:
            timeout_s: For one try; None to try as often and as long as for other calls.
        """
        attempt = partial(Hold.open, self._hold_session, opening)
        if timeout_s is None:
            return self._retried(attempt)
        return self._translating(attempt, min(timeout_s, self._timeout_s))

    def get_server_info(self) -> pb.GetServerInfoResponse:
        """Call GetServerInfo."""
        return self._get_server_info(Envelope(pb.GetServerInfoRequest(), {})).message

    def health(self) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        try:
            response = self._check_health(health_pb2.HealthCheckRequest(), timeout=self._timeout_s)
        except (grpc.RpcError, ValueError) as error:
            raise self._translated(error) from None
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def close(self) -> None:
        """Close the channel. Calls under way end with CallCancelledError."""
        self._closed = True
        if self._direct is not None:
            self._direct.close()
        # gRPC ends the calls at once, but then waits for what is being written, if need be for ever
        closer = threading.Thread(target=self._channel.close, daemon=True)
        closer.start()
        closer.join(_CLOSE_S)
        self._results.clear()

    def _unary(
        self, method: str, response_type: type[_Response], number: Method | None = None
    ) -> Callable[..., Envelope[_Response]]:
        rpc: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_path(method))

        def call(
            request: Envelope[Any], *, is_brief: bool = False, late_copy: LateCopy | None = None
        ) -> Envelope[_Response]:
            data = encode(request)
            if late_copy is not None and not self._early_calls.is_due():
                late_copy.make()

            def directly(direct: DirectLines, timeout_s: float) -> tuple[bytes, str]:
                if number is None or not is_brief:
                    raise NoLineError
                if late_copy is None or late_copy.is_made:
                    return direct.call(number, data, timeout_s)
                reply = direct.call(number, data, timeout_s, late_copy)
                # a server that computes on the host, or for others too, does not follow: then it costs
                # both ends more to speak of progress than it saves
                self._early_calls.note(has_paid=FOLLOW_ENTRY in reply.ledger)
                return reply

            def by_grpc(timeout_s: float) -> bytes:
                if late_copy is not None:
                    late_copy.make()
                response, ended = rpc.with_call(data, timeout=timeout_s)
                self._note(ended.trailing_metadata())
                return response

            return decode(response_type, self._made(directly, by_grpc))

        return call

    def _stream(self, method: str) -> grpc.StreamStreamMultiCallable[bytes, bytes]:
        return self._channel.stream_stream(_path(method))

    def _streamed(
        self,
        number: Method,
        rpc: grpc.StreamStreamMultiCallable[bytes, bytes],
        begin: Callable[[], Attempt[_Response, _T]],
        response_type: type[_Response],
    ) -> _T:
        def directly(direct: DirectLines, timeout_s: float) -> tuple[_T, str]:
            exchange = begin()
            talk = Conversation(
                number,
                exchange.parts(),
                lambda source: exchange.receive(self._reader(source, response_type)),
                response_type,
                exchange.at_once,
            )
            return direct.converse(talk, timeout_s)

        def by_grpc(timeout_s: float) -> _T:
            exchange = begin()
            messages = (message for part in exchange.parts() for message in messages_of(part))
            responses = rpc(messages, timeout=timeout_s)
            try:
                source = ChunkSource(responses, response_type)
                received = exchange.receive(self._reader(source, response_type))
                self._note(responses.trailing_metadata())
                return received
            finally:
                responses.cancel()  # no effect on a call that has ended

        return self._made(directly, by_grpc)

    def _reader(self, source: PartSource, response_type: type[_Response]) -> PartReader[_Response]:
        return PartReader(source, response_type, self._results.empty)

    def _made(
        self,
        directly: Callable[[DirectLines, float], tuple[_T, str]],
        by_grpc: Callable[[float], _T],
    ) -> _T:
        """Make a call, directly if that can be, and try it again if that may help."""

        def attempt(timeout_s: float) -> _T:
            if self._direct is None:
                return by_grpc(timeout_s)
            deadline_s = time.monotonic() + timeout_s
            try:
                returned, ledger = directly(self._direct, timeout_s)
            except NoLineError:
                return by_grpc(deadline_s - time.monotonic())
            self._note(((METADATA_KEY, ledger),))
            return returned

        return self._retried(attempt)

    def _retried(self, attempt: Callable[[float], _T]) -> _T:
        return with_retries(
            partial(self._translating, attempt),
            timeout_s=self._timeout_s,
            is_closed=lambda: self._closed,
        )

    def _translating(self, attempt: Callable[[float], _T], timeout_s: float) -> _T:
        try:
            return attempt(timeout_s)
        except (grpc.RpcError, ValueError, DeadlineError) as error:
            raise self._translated(error) from None

    @property
    def last_ledger(self) -> dict[str, int]:
        """The ledger of the calling thread's last call that was answered."""
        return ledger_from_metadata(getattr(self._ended, "metadata", ()))

    def _note(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        self._ended.metadata = metadata

    def _translated(self, error: grpc.RpcError | ValueError | DeadlineError) -> Exception:
        """Return the error of ours that an error of gRPC's stands for, and any other as it is."""
        if isinstance(error, grpc.RpcError):
            # A stream's is the call itself, which frames hold that the error would hold: the caller's
            # arrays would stay until the garbage collector finds them.
            error.__traceback__ = None
            # every RpcError of a channel is its Call too, which the types do not say
            return self._advice.added_to(error_from_rpc(cast("grpc.Call", error)))
        if isinstance(error, DeadlineError):  # of a line, or of the server at the end of one
            return self._advice.added_to(error)
        if self._closed and not isinstance(error, DeconvdError):
            return CallCancelledError(f"the connection is closed: {error}")
        return error


def _path(method: str) -> str:
    return f"/{_SERVICE.full_name}/{method}"


def _only_message(source: FrameSource) -> Any:
    """Return the message of a response that has one."""
    message = source.next()
    source.next()  # the end
    return message
