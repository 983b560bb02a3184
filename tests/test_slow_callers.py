"""Calls by gRPC whose clients say no more, or take no more, end in time, whatever their methods. They keep no drain."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import grpc
import pytest

from deconvd.errors import UnavailableError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_server.exit_codes import ExitCode
from tests.http2 import METHODS, Http2Client
from tests.servers import ServerProcess, server_process
from tests.session_clients import error_of, open_session, tensor_header
from tests.soak.hostile.by_memory import Borrower
from tests.soak.hostile.http2 import HEALTH, SERVICE, Http2
from tests.soak.hostile.requests import stream_of

GRPC = "deconvd_server.transports.grpc"
SOON = {
    f"{GRPC}.server:STALL_LIMIT_S": 0.5,
    f"{GRPC}.server:_FIRST_MESSAGE_S": 0.5,
    f"{GRPC}.rpc_messages:_STALL_S": 0.5,
}
WAIT_S = 60.0

SIDE = 450
STREAM = stream_of(
    pb.DeconvolveRequest(x=tensor_header(1, 1, SIDE, SIDE), w=tensor_header(1, 1, 1, 1))
)
"""The header of a stream whose y is one message of 800 KB."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, listen=("unix", "127.0.0.1:0"), constants=SOON) as running:
        yield running


def connect_reading(stack: ExitStack, server: ServerProcess, answer_bytes: int) -> Http2:
    """Return a client that lets so many bytes of each answer come."""
    host, _, port = server.targets[1].rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_S)
    return stack.enter_context(Http2(connection, answer_bytes=answer_bytes))


@pytest.mark.parametrize("path", [f"{HEALTH}Check", f"{SERVICE}GetServerInfo"])
def test_a_small_answer_that_nobody_takes_is_cut(path: str, server: ServerProcess) -> None:
    with ExitStack() as stack:
        client = connect_reading(stack, server, answer_bytes=0)
        number = client.call(path, b"")

        client.wait_for_reset(number)


def test_a_stream_whose_last_message_nobody_takes_ends(server: ServerProcess) -> None:
    with ExitStack() as stack:
        client = connect_reading(stack, server, answer_bytes=1 << 16)
        number = client.call(f"{SERVICE}DeconvolveStream", STREAM, is_last=False)
        client.send(number, pb.DeconvolveStreamRequest(chunk=bytes(4)).SerializeToString())
        x = pb.DeconvolveStreamRequest(chunk=bytes(4 * SIDE * SIDE))
        client.send(number, x.SerializeToString(), is_last=True)

        client.wait_for_reset(number)
        assert server.end() == ExitCode.DRAINED


def test_a_tensor_in_shared_memory_whose_client_says_no_end_is_not_waited_for(
    server: ServerProcess,
) -> None:
    memory_path = f"{server.targets[0].removeprefix('unix:')}.memory"
    with open_session(server.targets[1]) as client, Borrower(memory_path) as borrower:
        place = borrower.lend(4096)
        tensor = tensor_header(4)
        tensor.shared.CopyFrom(place)
        messages: SimpleQueue[pb.PutTensorRequest | None] = SimpleQueue()
        header = pb.PutTensorHeader(session=client.session, tensor=tensor)
        messages.put(pb.PutTensorRequest(header=header))
        try:
            with pytest.raises(grpc.RpcError) as failure:
                client.stub.PutTensor(iter(messages.get, None), timeout=WAIT_S)
        finally:
            messages.put(None)

    assert isinstance(error_of(failure), UnavailableError)
    assert "no message of the call" in str(error_of(failure))


@pytest.mark.parametrize("path", METHODS)
def test_a_call_that_sends_nothing_ends(path: str, server: ServerProcess) -> None:
    with Http2Client(server.targets[1]) as client:
        client.begin(path)
        client.read_until(b"the call has sent no message")
