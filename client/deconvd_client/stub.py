"""The service's RPCs as functions: each has a deadline, and raises errors of deconvd.errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2

from deconvd.array_memory import ArrayMemory
from deconvd.chunks import ChunkSource, messages_of
from deconvd.codec import Envelope, decode, encode
from deconvd.direct_events import Method
from deconvd.errors import CallCancelledError, DeadlineError, DeconvdError
from deconvd.grpc_status import error_from_rpc
from deconvd.ledger import FOLLOW_ENTRY, METADATA_KEY, ledger_from_metadata
from deconvd.line import FrameSource
from deconvd.messages import messages_for
from deconvd.operation import OPERATIONS, Operation
from deconvd.parts import Part, PartReader, PartSource
from deconvd.trials import Trials
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.advice import Advice
from deconvd_client.deadline import Deadline
from deconvd_client.direct import DirectLines, NoLineError
from deconvd_client.direct_call import Conversation
from deconvd_client.direct_ways import Way
from deconvd_client.hold import Hold
from deconvd_client.late_copy import LateCopy
from deconvd_client.rpcs import Metadata, Rpcs

__all__ = ["Attempt", "Stub"]

_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=Message)
_Response = TypeVar("_Response", bound=Message)
_Returned = TypeVar("_Returned", covariant=True)

_SERVICE: Final = pb.DESCRIPTOR.services_by_name["DeconvolutionService"]

_HEALTH_PATH: Final = "/grpc.health.v1.Health/Check"

_ASK_S: Final = 5.0
"""How long a server may take to say where it takes direct calls: calls go by gRPC meanwhile."""

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
    """The RPCs of one channel, each tried once and until its deadline.

    Every method raises a DeconvdError; see `deconvd.errors`.

    Args:
        way: How calls can be made directly; None if they are not to be. Those that cannot are made
            by gRPC.
        advice: What errors say beside gRPC's own words.
    """

    def __init__(self, rpcs: Rpcs, way: Way | None, advice: Advice) -> None:
        self._rpcs = rpcs
        self._advice = advice
        self._direct = None if way is None else DirectLines(way, self._told_by_server)
        self._closed = False
        self._ended = threading.local()
        self._results = ArrayMemory(_KEPT_BYTES)
        self._early_calls = Trials()
        self._operations = {
            operation: self._unary(
                operation.name, messages_for(operation).response, Method[operation.name]
            )
            for operation in OPERATIONS
        }
        self._get_server_info = self._unary("GetServerInfo", pb.GetServerInfoResponse)
        self._drop_tensors = self._unary("DropTensors", pb.DropTensorsResponse)

    def call(
        self,
        operation: Operation,
        request: Envelope[Any],
        deadline: Deadline,
        *,
        is_brief: bool = False,
        late_copy: LateCopy | None = None,
    ) -> Envelope[Any]:
        """Have an operation computed.

        Args:
            is_brief: Whether request and response are small enough for a direct call.
            late_copy: Puts operands where the request says that they are: meanwhile, if the call is direct.
        """
        return self._operations[operation](
            request, deadline, is_brief=is_brief, late_copy=late_copy
        )

    @property
    def is_direct(self) -> bool:
        """Whether calls are likely to be made directly, streams too."""
        return self._direct is not None and self._direct.is_worth_asking

    def stream(
        self, operation: Operation, begin: Callable[[], Attempt[Any, _T]], deadline: Deadline
    ) -> _T:
        """Have an operation computed in a stream, and return what is made of the response.

        Args:
            begin: Called once for each attempt: again, if a direct line was lost.
        """
        method, response_type = (
            Method[operation.stream_name],
            messages_for(operation).stream_response,
        )
        return self._streamed(method, begin, response_type, deadline)

    def put_tensor(
        self, parts: Callable[[], Iterator[Part]], deadline: Deadline
    ) -> pb.PutTensorResponse:
        """Call PutTensor.

        Args:
            parts: Returns the request's parts; called once for each attempt.
        """

        def directly(direct: DirectLines) -> tuple[pb.PutTensorResponse, str]:
            talk = Conversation(Method.PutTensor, parts(), _only_message, pb.PutTensorResponse)
            return direct.converse(talk, deadline)

        def by_grpc() -> tuple[pb.PutTensorResponse, Metadata]:
            messages = (message for part in parts() for message in messages_of(part))
            return self._rpcs.stream(_path("PutTensor"), messages, receive, deadline)

        def receive(responses: Iterator[bytes]) -> pb.PutTensorResponse:
            (response,) = responses
            return pb.PutTensorResponse.FromString(response)

        return self._made(directly, by_grpc)

    def get_tensor(
        self,
        request: pb.GetTensorRequest,
        receive: Callable[[PartReader[pb.GetTensorResponse]], _T],
        deadline: Deadline,
    ) -> _T:
        """Call GetTensor and return what `receive`, called once for each attempt, makes of the response."""

        def directly(direct: DirectLines) -> tuple[_T, str]:
            talk = Conversation(
                Method.GetTensor,
                iter([request]),
                lambda source: receive(self._reader(source, pb.GetTensorResponse)),
                pb.GetTensorResponse,
            )
            return direct.converse(talk, deadline)

        def by_grpc() -> tuple[_T, Metadata]:
            def read(responses: Iterator[bytes]) -> _T:
                source = ChunkSource(responses, pb.GetTensorResponse)
                return receive(self._reader(source, pb.GetTensorResponse))

            requests = iter([request.SerializeToString()])
            return self._rpcs.stream(_path("GetTensor"), requests, read, deadline)

        return self._made(directly, by_grpc)

    def drop_tensors(self, request: pb.DropTensorsRequest, deadline: Deadline) -> None:
        """Call DropTensors."""
        self._drop_tensors(Envelope(request, {}), deadline)

    def hold_session(self, opening: pb.HoldSessionRequest, deadline: Deadline) -> Hold:
        """Call HoldSession, and return once the server has answered the first message."""
        return self._translating(lambda: self._rpcs.hold(_path("HoldSession"), opening, deadline))

    def get_server_info(self, deadline: Deadline) -> pb.GetServerInfoResponse:
        """Call GetServerInfo."""
        return self._get_server_info(Envelope(pb.GetServerInfoRequest(), {}), deadline).message

    def health(self, deadline: Deadline) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        request = health_pb2.HealthCheckRequest().SerializeToString()
        data, _ = self._translating(lambda: self._rpcs.unary(_HEALTH_PATH, request, deadline))
        response = health_pb2.HealthCheckResponse.FromString(data)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)

    def close(self, deadline: Deadline) -> None:
        """Close the channel. Calls under way end with CallCancelledError.

        Args:
            deadline: When to return, although the other end takes nothing any more.
        """
        self._closed = True
        if self._direct is not None:
            self._direct.close()
        self._rpcs.close(deadline)
        self._results.clear()

    def _unary(
        self, method: str, response_type: type[_Response], number: Method | None = None
    ) -> Callable[..., Envelope[_Response]]:
        path = _path(method)

        def call(
            request: Envelope[Any],
            deadline: Deadline,
            *,
            is_brief: bool = False,
            late_copy: LateCopy | None = None,
        ) -> Envelope[_Response]:
            data = encode(request)
            if late_copy is not None and not self._early_calls.is_due():
                late_copy.make()

            def directly(direct: DirectLines) -> tuple[bytes, str]:
                if number is None or not is_brief:
                    raise NoLineError
                if late_copy is None or late_copy.is_made:
                    return direct.call(number, data, deadline)
                reply = direct.call(number, data, deadline, late_copy)
                # a server that computes on the host, or for others too, does not follow: then it costs
                # both ends more to speak of progress than it saves
                self._early_calls.note(has_paid=FOLLOW_ENTRY in reply.ledger)
                return reply

            def by_grpc() -> tuple[bytes, Metadata]:
                if late_copy is not None:
                    late_copy.make()
                return self._rpcs.unary(path, data, deadline)

            return decode(response_type, self._made(directly, by_grpc))

        return call

    def _streamed(
        self,
        number: Method,
        begin: Callable[[], Attempt[_Response, _T]],
        response_type: type[_Response],
        deadline: Deadline,
    ) -> _T:
        def directly(direct: DirectLines) -> tuple[_T, str]:
            exchange = begin()
            talk = Conversation(
                number,
                exchange.parts(),
                lambda source: exchange.receive(self._reader(source, response_type)),
                response_type,
                exchange.at_once,
            )
            return direct.converse(talk, deadline)

        def by_grpc() -> tuple[_T, Metadata]:
            exchange = begin()
            messages = (message for part in exchange.parts() for message in messages_of(part))

            def receive(responses: Iterator[bytes]) -> _T:
                source = ChunkSource(responses, response_type)
                return exchange.receive(self._reader(source, response_type))

            return self._rpcs.stream(_path(number.name), messages, receive, deadline)

        return self._made(directly, by_grpc)

    def _reader(self, source: PartSource, response_type: type[_Response]) -> PartReader[_Response]:
        return PartReader(source, response_type, self._results.empty)

    def _made(
        self,
        directly: Callable[[DirectLines], tuple[_T, str]],
        by_grpc: Callable[[], tuple[_T, Metadata]],
    ) -> _T:
        """Make a call: directly if that can be, else by gRPC."""
        try:
            if self._direct is not None:
                try:
                    returned, ledger = directly(self._direct)
                except NoLineError:
                    pass
                else:
                    self._note(((METADATA_KEY, ledger),))
                    return returned
            returned, metadata = by_grpc()
            self._note(metadata)
            return returned
        except (grpc.RpcError, ValueError, DeadlineError) as error:
            raise self._translated(error) from None

    def _translating(self, attempt: Callable[[], _T]) -> _T:
        try:
            return attempt()
        except (grpc.RpcError, ValueError, DeadlineError) as error:
            raise self._translated(error) from None

    def _told_by_server(self) -> pb.GetServerInfoResponse:
        return self.get_server_info(Deadline(_ASK_S))

    @property
    def last_ledger(self) -> dict[str, int]:
        """The ledger of the calling thread's last call that was answered."""
        return ledger_from_metadata(getattr(self._ended, "metadata", ()))

    def _note(self, metadata: Metadata) -> None:
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
