"""What all transports of the client promise alike: by gRPC, directly, and from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from deconvd.direct.events import MethodCode
from deconvd.errors import CallCancelledError, DeadlineError, InvalidArgumentError
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.operation import DECONVOLVE
from deconvd.model.options import Options
from deconvd.model.problem import problem_of, spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.ledger import parse_ledger
from deconvd.wire.stream_parts import Part, PartReader, PartSource, elements_part
from deconvd.wire.tensor import array_from_message, message_from_array
from deconvd_client.calls.call_spec import make_request
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.overlapped_copy import OverlappedCopy
from deconvd_client.calls.transport import NotServedDirectlyError, StreamAttempt, Transport
from deconvd_client.transports.direct.connectors import UnixConnector
from deconvd_client.transports.direct.pool import DirectTransport
from deconvd_client.transports.failover import Failover
from deconvd_client.transports.grpc.channel import MAX_MESSAGE_BYTES, open_channel
from deconvd_client.transports.grpc.error_hints import ErrorHints
from deconvd_client.transports.grpc.rpcs import RpcChannel
from deconvd_client.transports.grpc.transport import GrpcTransport
from tests.deadlines import short_deadline
from tests.direct_calls import REQUEST, W, get_server_info
from tests.servers import ServerProcess, server_process, stop_server

X = np.arange(600, dtype=np.float32).reshape(100, 1, 2, 3)
ONE = np.ones((1, 1, 1, 1), np.float32)


@pytest.fixture
def running(socket_directory: Path) -> Iterator[ServerProcess]:
    with server_process(socket_directory, listen=("unix", "127.0.0.1:0")) as server:
        yield server


@contextmanager
def by_grpc(server: ServerProcess) -> Iterator[GrpcTransport]:
    target = server.target
    rpcs = RpcChannel(lambda: open_channel(target, max_message_bytes=MAX_MESSAGE_BYTES, proxy=None))
    transport = GrpcTransport(rpcs, ErrorHints(target, None))
    yield transport
    transport.close(short_deadline())


@contextmanager
def directly(server: ServerProcess) -> Iterator[DirectTransport]:
    told = get_server_info(server)
    way = UnixConnector(server.target.removeprefix("unix:"))
    with closing(DirectTransport(way, lambda: told)) as transport:
        while not _carries(transport):
            pass
        yield transport


@contextmanager
def at_second(server: ServerProcess) -> Iterator[Failover]:
    """A failover whose first transport never gets a line."""
    with by_grpc(server) as second:
        way = UnixConnector(server.target.removeprefix("unix:"))
        with closing(DirectTransport(way, pb.GetServerInfoResponse)) as first:
            yield Failover(first, second)


def _carries(transport: Transport) -> bool:
    try:
        transport.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())
    except NotServedDirectlyError:
        return False
    return True


@pytest.fixture(params=[by_grpc, directly, at_second])
def transport(request: pytest.FixtureRequest, running: ServerProcess) -> Iterator[Transport]:
    with request.param(running) as opened:
        yield opened


def parts(step: int) -> Iterator[Part]:
    problem = problem_of(spec_of(X), spec_of(ONE), Geometry())
    request = make_request(DECONVOLVE, problem, Options(), ("y",))
    header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=step)  # type: ignore[arg-type]  # the operation says which
    yield pb.DeconvolveStreamRequest(header=header)
    yield elements_part(ONE)
    for start in range(0, len(X), 10):
        yield elements_part(X[start : start + 10])


def receive(source: PartSource) -> Array:
    reader = PartReader(source, pb.DeconvolveStreamResponse)
    reader.read_header()
    y = reader.read("y", spec_of(X))
    reader.expect_end()
    return y


def begin(began: list[int], step: int = 10) -> StreamAttempt[Array]:
    began.append(step)
    return StreamAttempt(
        MethodCode.DeconvolveStream,
        parts(step),
        receive,
        pb.DeconvolveStreamResponse,
        is_full_duplex=True,
    )


def test_a_message_is_answered_and_its_ledger_comes_with_it(transport: Transport) -> None:
    response, ledger = transport.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())

    y = pb.DeconvolveResponse.FromString(response).y
    assert array_from_message("y", y).shape == (1, 2, 4, 4)
    assert parse_ledger(ledger)["server_us"] > 0


def test_a_stream_is_answered_and_its_ledger_comes_with_it(transport: Transport) -> None:
    began: list[int] = []

    y, ledger = transport.stream(partial(begin, began), short_deadline())

    np.testing.assert_array_equal(y, X)
    assert parse_ledger(ledger)["server_us"] > 0


def test_what_the_server_refuses_is_raised_and_not_begun_again(transport: Transport) -> None:
    wrong = pb.DeconvolveRequest(x=REQUEST.x, w=message_from_array(W[:3]))
    began: list[int] = []

    with pytest.raises(InvalidArgumentError, match="W"):
        transport.unary("Deconvolve", wrong.SerializeToString(), short_deadline())
    with pytest.raises(InvalidArgumentError, match="slice_samples_count"):
        transport.stream(partial(begin, began, -1), short_deadline())
    assert len(began) == 1
    response, _ = transport.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())
    assert response


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_server_that_says_nothing_ends_no_call_later_than_its_deadline(
    transport: Transport, running: ServerProcess, is_stream: bool
) -> None:
    deadline = Deadline(1)
    call = (
        partial(transport.stream, partial(begin, []), deadline)
        if is_stream
        else partial(transport.unary, "Deconvolve", REQUEST.SerializeToString(), deadline)
    )
    with stop_server(running), pytest.raises(DeadlineError):
        call()
    assert deadline.remaining_s() == 0


def test_a_line_that_was_lost_has_the_call_begun_again_by_the_second(
    running: ServerProcess,
) -> None:
    began: list[int] = []

    def lose(source: PartSource) -> Array:
        for line in [known() for known in first._busy]:
            assert line is not None
            line.shutdown()
        return receive(source)

    def begin_and_lose() -> StreamAttempt[Array]:
        talk = begin(began)
        if len(began) > 1:
            return talk
        return StreamAttempt(talk.method, talk.parts, lose, talk.response_type, is_full_duplex=True)

    with by_grpc(running) as second, directly(running) as first:
        y, _ = Failover(first, second).stream(begin_and_lose, short_deadline())

    np.testing.assert_array_equal(y, X)
    assert len(began) == 2


class CountingTransport(DirectTransport):
    """Direct connections that count how often a call is brought to them."""

    tries_count = 0

    def unary(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        overlapped_copy: OverlappedCopy | None = None,
    ) -> tuple[bytes, str]:
        self.tries_count += 1
        return super().unary(method, request, deadline, overlapped_copy)


def test_a_transport_that_is_known_to_carry_nothing_is_not_tried(running: ServerProcess) -> None:
    way = UnixConnector(running.target.removeprefix("unix:"))
    with (
        by_grpc(running) as second,
        closing(CountingTransport(way, pb.GetServerInfoResponse)) as first,
    ):
        transport = Failover(first, second)
        for _ in range(3):
            transport.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())

        assert not first.may_carry
        assert first.tries_count == 1


def test_a_closed_transport_says_so(running: ServerProcess) -> None:
    with by_grpc(running) as transport:
        transport.close(short_deadline())
        with pytest.raises(CallCancelledError, match="the connection is closed"):
            transport.unary("Deconvolve", REQUEST.SerializeToString(), short_deadline())
