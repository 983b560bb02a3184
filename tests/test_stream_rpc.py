"""The client's streams by gRPC: one thread sends and receives, and frees the call whatever happens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import grpc
import pytest

from deconvd_client.transports.grpc.core import core_channel
from deconvd_client.transports.grpc.rpcs import RpcChannel
from deconvd_client.transports.grpc.stream_rpc import StreamRpc, StreamRpcError
from tests.deadlines import short_deadline

PATH = "/test.Streams/Call"
TIMEOUT_S = 20.0

Handler = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


@contextmanager
def serving(handler: Handler) -> Iterator[str]:
    """A server of grpcio's own with one streaming method."""
    server = grpc.server(ThreadPoolExecutor(4))
    rpc: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(handler)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Streams", {"Call": rpc}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


@contextmanager
def calling(
    handler: Handler,
    requests: Iterator[bytes],
    timeout_s: float = TIMEOUT_S,
) -> Iterator[StreamRpc]:
    """A call of the method. The channel closes at the end, which waits until gRPC has freed the call."""
    with (
        serving(handler) as target,
        grpc.insecure_channel(target) as channel,
        closing(StreamRpc(core_channel(channel), PATH, requests, timeout_s)) as call,
    ):
        yield call


def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests
    context.set_trailing_metadata((("ledger", "done"),))


def test_messages_come_back_in_their_order_and_the_metadata_at_the_end() -> None:
    messages = [bytes([n]) * (300_000 if n % 2 else n) for n in range(20)]

    with calling(echo, iter(messages)) as call:
        assert list(call) == messages
        assert ("ledger", "done") in [(key, value) for key, value in call.finish()]


def test_no_more_requests_are_taken_than_the_server_reads() -> None:
    is_answered = threading.Event()

    def answer_first(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"answer"
        is_answered.wait(TIMEOUT_S)
        yield from (b"" for _ in requests)

    taken: list[int] = []

    def requests() -> Iterator[bytes]:
        for number in range(20):
            taken.append(number)
            yield bytes(4 << 20)  # more than gRPC sends before the server reads

    with calling(answer_first, requests()) as call:
        assert next(call) == b"answer"
        # one may leave, and one more: gRPC's windows grow while it runs
        assert taken in ([0], [0, 1])
        is_answered.set()
        assert list(call) == [b""] * 20
        assert taken == list(range(20))


def test_a_failure_of_the_server_says_how_it_failed() -> None:
    def fail(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield next(requests)
        context.set_trailing_metadata((("reason", "test"),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")

    with calling(fail, (bytes(1 << 20) for _ in range(1000))) as call:
        assert len(next(call)) == 1 << 20
        with pytest.raises(StreamRpcError) as raised:
            list(call)
    failure = raised.value
    assert (failure.code(), failure.details()) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "too much",
    )
    assert ("reason", "test") in [(key, value) for key, value in failure.trailing_metadata()]


def test_an_error_of_the_requests_is_raised_and_ends_the_call() -> None:
    has_begun, has_ended = threading.Event(), threading.Event()

    def watch(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(has_ended.set)
        has_begun.set()
        yield from requests

    def break_off() -> Iterator[bytes]:
        yield b"one"
        has_begun.wait(TIMEOUT_S)
        raise MemoryError("no room for a message")

    with (
        pytest.raises(MemoryError, match="no room for a message"),
        calling(watch, break_off()) as call,
    ):
        list(call)
    assert has_ended.wait(TIMEOUT_S)


def test_a_call_can_be_cancelled_while_a_response_is_waited_for() -> None:
    has_begun, may_end = threading.Event(), threading.Event()

    def wait(_requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(may_end.set)
        has_begun.set()
        may_end.wait(TIMEOUT_S)
        yield from ()

    with calling(wait, iter((b"one",))) as call:

        def cancel() -> None:
            has_begun.wait(TIMEOUT_S)
            call.cancel()

        canceller = threading.Thread(target=cancel)
        canceller.start()
        with pytest.raises(StreamRpcError) as raised:
            next(call)
        canceller.join()
    assert raised.value.code() is grpc.StatusCode.CANCELLED


def test_a_call_ends_at_its_deadline_also_in_the_middle_of_a_message() -> None:
    may_end = threading.Event()

    def wait(_requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(may_end.set)
        may_end.wait(TIMEOUT_S)
        yield from ()

    with calling(wait, (bytes(4 << 20) for _ in range(9)), timeout_s=0.3) as call:
        with pytest.raises(StreamRpcError) as raised:
            next(call)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_call_that_is_left_half_way_does_not_hold_up_the_channel() -> None:
    with calling(echo, (bytes(1 << 20) for _ in range(100))) as call:
        assert len(next(call)) == 1 << 20


class Recorder(grpc.StreamStreamClientInterceptor):
    """What instruments a program sees its calls in this way."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        self.paths.append(details.method)
        return continuation(details, requests)


def test_a_channel_that_is_instrumented_sees_the_call() -> None:
    recorder = Recorder()
    with serving(echo) as target:
        rpcs = RpcChannel(lambda: grpc.intercept_channel(grpc.insecure_channel(target), recorder))
        received, metadata = rpcs.stream(PATH, iter((b"one", b"two")), list, short_deadline())
        rpcs.close(short_deadline())
    assert received == [b"one", b"two"]
    assert ("ledger", "done") in [(key, value) for key, value in metadata]
    assert recorder.paths == [PATH]
