"""A gRPC call counts its batches: it is done once gRPC has handed back each of them, or lost it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deconvd_server.transports.grpc.core import cygrpc
from deconvd_server.transports.grpc.rpc import Rpc


class Call:
    """A call of gRPC's core that hands batches back when the test says so."""

    def __init__(self) -> None:
        self.batches: list[Callable[[Any], None]] = []

    def peer(self) -> bytes:
        return b"ipv4:127.0.0.1:1"

    def start_server_batch(self, _operations: object, batch: Callable[[Any], None]) -> Any:
        self.batches.append(batch)
        return cygrpc.CallError.ok

    def hand_back(self, message: bytes | None = None) -> None:
        """Hand the oldest batch back. If it is one that receives, the message has come."""
        operation = SimpleNamespace(message=lambda: message)
        self.batches.pop(0)(SimpleNamespace(batch_operations=(operation,)))


@pytest.fixture
def call() -> Call:
    return Call()


@pytest.fixture
def done() -> list[Rpc]:
    return []


@pytest.fixture
def rpc(call: Call, done: list[Rpc]) -> Rpc:
    details = SimpleNamespace(method=b"/service/method", deadline=math.inf)
    event = SimpleNamespace(invocation_metadata=(), call_details=details, call=call)
    return Rpc(event, lambda _delay_s, _work: None, done.append)


def test_a_call_is_done_once_its_last_batch_is_back(rpc: Rpc, call: Call, done: list[Rpc]) -> None:
    rpc.finish(())

    call.hand_back()  # the client has closed the call
    assert (rpc.is_closed, done) == (True, [])
    call.hand_back()  # the status has left
    assert done == [rpc]


def test_a_message_that_was_lost_ends_its_batch_once(rpc: Rpc, call: Call, done: list[Rpc]) -> None:
    messages: list[bytes | None] = []
    rpc.receive(messages.append)
    assert not rpc.drop_lost_receive()
    call.batches.pop()  # no memory for its event: the batch is gone

    assert [rpc.drop_lost_receive(), rpc.drop_lost_receive()] == [True, False]

    rpc.finish(())
    call.hand_back()
    call.hand_back()
    assert (messages, done) == ([], [rpc])


def test_a_message_that_is_asked_for_after_the_end_is_not_taken_for_a_lost_one(
    rpc: Rpc, call: Call, done: list[Rpc]
) -> None:
    messages: list[bytes | None] = []
    rpc.finish(())

    rpc.receive(messages.append)

    assert (messages, rpc.is_receiving) == ([None], False)
    assert not rpc.drop_lost_receive()
    call.hand_back()
    assert done == []  # the status has not left
    call.hand_back()
    assert done == [rpc]


def test_an_error_of_a_callback_ends_the_call_and_its_batch(
    rpc: Rpc, call: Call, done: list[Rpc], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_message: bytes | None) -> None:
        raise RuntimeError("a handler's mistake")

    rpc.receive(fail)
    call.batches.reverse()
    call.hand_back(b"message")

    assert rpc.has_ended
    assert "a handler's mistake" in caplog.text
    call.hand_back()
    call.hand_back()
    assert done == [rpc]
