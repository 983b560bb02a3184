"""The service's methods as functions: each makes one call, by its deadline, and raises DeconvdErrors."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import numpy as np

from deconvd.errors import DeconvdError, UnimplementedError
from deconvd.model.dtypes import Array
from deconvd.model.operation import ARGUMENTS
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import Envelope, decode, encode
from deconvd.wire.messages import messages_for
from deconvd.wire.packed_elements import PACKED_ELEMENTS
from deconvd.wire.tensor import array_of_expected_spec
from deconvd_client.calls.call_spec import CallResult, CallSpec
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.patience import Patience
from deconvd_client.calls.responses import (
    MALFORMED_ERRORS,
    malformed_response,
    parse_response,
)
from deconvd_client.calls.transport import StreamAttempt, Transport
from deconvd_client.transports.direct.connectors import Connector
from deconvd_client.transports.direct.pool import ConnectionGate, DirectTransport
from deconvd_client.transports.direct.striped_transport import StripedTransport
from deconvd_client.transports.failover import Failover
from deconvd_client.transports.grpc.transport import GrpcTransport
from deconvd_client.transports.link_rate import LinkRate
from deconvd_client.transports.session_stream import SessionStream

__all__ = ["Stub"]

_T = TypeVar("_T")

_SERVER_INFO_TIMEOUT_S: Final = 5.0
"""How long a server may take to say where it accepts direct connections: until then calls go by gRPC."""

_FEATURES_AGE_S: Final = 1.0
"""How old the names of a server's features may be. No server of another version comes in less time."""

_SOCKETS_AGE_S: Final = 0.1
"""How old the names of its sockets may be: a first call needs several of them. A killed server is replaced in half a
second."""


@dataclass(frozen=True, slots=True)
class _RecentInfo:
    """What a server has told of itself.

    Attributes:
        told_s: When, on the monotonic clock.
        purposes: For which of them it has been used.
    """

    info: pb.GetServerInfoResponse
    told_s: float
    purposes: set[str] = field(default_factory=set)

    @property
    def age_s(self) -> float:
        """How long ago it was told."""
        return time.monotonic() - self.told_s


_NO_INFO: Final = _RecentInfo(pb.GetServerInfoResponse(), -math.inf)
"""Of a server that has told nothing yet."""


class Stub:
    """The methods of the server at one target.

    Small calls and streams use direct connections where there are some; gRPC carries the rest.

    Args:
        target: Where the server is.
        grpc: Carries all calls that no direct connection carries.
        connector: Opens direct connections; None if there must not be any.
        patience: Bounds how long calls wait for direct connections.
        note_info: Called with each GetServerInfo response; None if nobody needs to know.
        gate: Says whether direct connections may be opened; None if they always may.

    Attributes:
        direct: The direct connections; None if there must not be any.
        link_rate: The rate of the link to the target, whichever transport carries a call.
        striped: Makes large calls over several of them; None likewise.
    """

    def __init__(
        self,
        target: str,
        grpc: GrpcTransport,
        connector: Connector | None,
        patience: Patience,
        note_info: Callable[[pb.GetServerInfoResponse], None] | None = None,
        gate: ConnectionGate | None = None,
    ) -> None:
        self._note_info = note_info
        self.target: str = target
        self.link_rate: LinkRate = LinkRate()
        self._grpc = grpc
        self._takes_packed: bool | None = None  # None until the server has said it
        self._recent = _NO_INFO
        self.direct: DirectTransport | None = None
        self._transport: Transport = grpc
        self._at_most_once_transport: Transport = grpc
        self.striped: StripedTransport | None = None
        if connector is not None:
            self.direct = DirectTransport(connector, self._fetch_server_info, patience, gate)
            self.striped = StripedTransport(self.direct)
            self._transport = Failover(self.direct, grpc)
            self._at_most_once_transport = Failover(self.direct, grpc, at_most_once=True)

    def call(
        self,
        call_spec: CallSpec,
        request: Envelope[Any],
        *,
        placed: Mapping[str, Array],
        overlapped_copy: OverlappedCopy | None = None,
        is_brief: bool,
    ) -> CallResult:
        """Have an operation computed by a call of one message.

        Args:
            request: The message: `call_spec.request`, and where its tensors are.
            placed: Memory where the request asks the server to write results, by their fields.
            overlapped_copy: Puts operands where the request says that they are: during the call, if it is direct.
            is_brief: Whether request and response are small enough for a direct connection.

        Raises:
            OutcomeUnknownError: The server may still be writing to `placed`. Call again, with other memory.
        """
        transport: Transport = self._grpc
        if is_brief:
            transport = self._at_most_once_transport if placed else self._transport
        operation = call_spec.operation
        data, ledger = transport.unary(
            operation.name, encode(request), call_spec.deadline, overlapped_copy
        )
        response_type = messages_for(operation).response
        arrays: dict[str, Array] = {}
        try:
            response: Envelope[Any] = decode(response_type, data)
            for field, spec in call_spec.results.items():
                message: pb.Tensor = getattr(response.message, field)
                if field in placed and message.WhichOneof("payload") == "shared":
                    arrays[field] = placed[field]
                else:  # a copy, which the caller may change
                    elements = response.raw.get(field)
                    arrays[field] = np.array(
                        array_of_expected_spec(ARGUMENTS[field], spec, message, elements)
                    )
        except MALFORMED_ERRORS as error:
            raise malformed_response(response_type, error) from None
        return CallResult(response.message, arrays, ledger)

    def stream(
        self,
        begin: Callable[[], StreamAttempt[_T]],
        deadline: Deadline,
        *,
        is_placed: bool = False,
    ) -> tuple[_T, str]:
        """Make a call of many parts; return what `StreamAttempt.receive` returns, and the ledger.

        Args:
            begin: Called once for each attempt: again, if a direct connection was lost.
            is_placed: Whether the server writes the result into shared memory.

        Raises:
            OutcomeUnknownError: The server may still be writing there. Call again, with other memory.
        """
        transport = self._at_most_once_transport if is_placed else self._transport
        return transport.stream(begin, deadline)

    @property
    def is_direct(self) -> bool:
        """Whether calls, also streams, are likely to use a direct connection."""
        return self.direct is not None and self.direct.may_connect

    def packs_elements(self, deadline: Deadline) -> bool:
        """Return whether elements with many zeros should be packed: the link is slow, and the server takes them.

        The server is asked if it has not said that yet, for a direct connection, say.
        """
        if not self.link_rate.is_slow:
            return False
        if self._takes_packed is None:
            with suppress(DeconvdError):  # the call itself will tell
                self.get_server_info(deadline.with_limit(_SERVER_INFO_TIMEOUT_S))
        return bool(self._takes_packed)

    def forget_info(self) -> None:
        """Have the server asked again what it is: another one may have come in its place."""
        self._takes_packed = None
        self._recent = _NO_INFO

    def require_feature(self, name: str, remedy: str, deadline: Deadline) -> None:
        """Raise an error if the server lacks a feature.

        Args:
            remedy: What the caller can do, for the error.

        Raises:
            UnimplementedError: The server lacks it.
        """
        if not self.has_feature(name, deadline):
            raise UnimplementedError(f"the server at {self.target} has no {name}: {remedy}")

    def has_feature(self, name: str, deadline: Deadline) -> bool:
        """Return whether the server has a feature. It is asked for its features, unless it has just named them."""
        recent = self._recent
        info = recent.info if recent.age_s < _FEATURES_AGE_S else self.get_server_info(deadline)
        return name in info.features

    def drop_tensors(self, request: pb.DropTensorsRequest, deadline: Deadline) -> None:
        """Call DropTensors."""
        self._grpc.unary("DropTensors", request.SerializeToString(), deadline)

    def hold_session(self, opening: pb.HoldSessionRequest, deadline: Deadline) -> SessionStream:
        """Call HoldSession, and return once the server has answered the first message."""
        return self._grpc.hold_session(opening, deadline)

    def get_server_info(
        self, deadline: Deadline, session: bytes = b"", *, wants_home: bool = False
    ) -> pb.GetServerInfoResponse:
        """Call GetServerInfo. For the arguments see `GetServerInfoRequest`."""
        request = pb.GetServerInfoRequest(session=session, wants_home=wants_home)
        response, _ = self._grpc.unary("GetServerInfo", request.SerializeToString(), deadline)
        info = parse_response(pb.GetServerInfoResponse, response)
        self._takes_packed = PACKED_ELEMENTS in info.features
        self._recent = _RecentInfo(info, time.monotonic())
        if self._note_info is not None:
            self._note_info(info)
        return info

    def find_sockets(self, purpose: str, deadline: Deadline) -> pb.GetServerInfoResponse:
        """Return what the server has told a moment ago, else call GetServerInfo.

        The threads of a first call look for sockets of two kinds, and would each ask. But one answer serves each
        purpose once: who looks again has found that a socket is not there any more.

        Args:
            purpose: What the sockets are for.
        """
        recent = self._recent
        if recent.age_s < _SOCKETS_AGE_S and purpose not in recent.purposes:
            recent.purposes.add(purpose)
            return recent.info
        return self.get_server_info(deadline)

    def health(self, deadline: Deadline) -> str:
        """Return the server's health: ``SERVING``, ``NOT_SERVING`` or another name of gRPC's."""
        return self._grpc.health(deadline)

    def close(self, deadline: Deadline) -> None:
        """Close the connections. Calls under way end with CallCancelledError.

        Args:
            deadline: When to return, even if the server no longer reads.
        """
        if self.direct is not None:
            self.direct.close()
        self._grpc.close(deadline)

    def _fetch_server_info(self) -> pb.GetServerInfoResponse:
        return self.find_sockets("calls", Deadline(_SERVER_INFO_TIMEOUT_S))
