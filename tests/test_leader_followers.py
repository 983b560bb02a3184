"""Threads that take turns at the small calls of direct connections."""

from __future__ import annotations

import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest

from deconvd.direct.events import Answer, CallHead, MethodCode
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.codec import decode
from deconvd.wire.tensor import message_from_array, message_from_spec
from deconvd_server.transports.direct.last_caller import LastCaller
from deconvd_server.transports.direct.leader_followers import LeaderFollowers
from tests.direct_calls import is_serving, open_stream, receive_answer, send_call
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.stream_pairs import descriptor_of, send_raw

_WAIT_S = 30.0

Watch: TypeAlias = Callable[[float, Callable[[], None]], None]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[ServerProcess]:
    with server_process(tmp_path, listen=("unix", "127.0.0.1:0")) as server:
        yield server


def request_of(number: int) -> tuple[bytes, np.ndarray]:
    """Return a small request that differs from others', and its y: x scaled, as W is one tap."""
    x = np.arange(number, number + 12, dtype=np.float32).reshape(1, 1, 3, 4)
    W = np.full((1, 1, 1, 1), number + 1, np.float32)
    request = pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(W))
    return request.SerializeToString(), x * (number + 1)


def y_of(answer: object) -> np.ndarray:
    assert isinstance(answer, Answer), answer
    envelope = decode(pb.DeconvolveResponse, answer.message)
    return np.frombuffer(envelope.raw["y"], np.float32).reshape(1, 1, 3, 4)


def test_each_of_sixteen_clients_gets_its_own_results_and_its_share(running: ServerProcess) -> None:
    with ExitStack() as stack:
        lines = [stack.enter_context(open_stream(running)) for _ in range(16)]
        by_descriptor = {
            descriptor_of(line): (line, *request_of(n)) for n, line in enumerate(lines)
        }
        events = select.epoll()
        stack.callback(events.close)
        counts: Counter[int] = Counter()
        for descriptor, (line, message, _) in by_descriptor.items():
            assert is_serving(line)  # once: from now on a small call is expected of it
            events.register(descriptor, select.EPOLLIN)
            send_call(line, MethodCode.Deconvolve, message)
        while counts.total() < 16 * 40:
            ready = events.poll(_WAIT_S)
            assert ready
            for descriptor, _ in ready:
                line, message, y = by_descriptor[descriptor]
                np.testing.assert_array_equal(y_of(receive_answer(line)), y)
                counts[descriptor] += 1
                send_call(line, MethodCode.Deconvolve, message)
        for line, _, y in by_descriptor.values():
            np.testing.assert_array_equal(y_of(receive_answer(line)), y)

    assert len(counts) == 16
    assert (
        min(counts.values()) >= 4
    )  # of 40 for each: one that was relieved by chance gets more of them


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_half_a_call_keeps_nobody_waiting(running: ServerProcess, transport: str) -> None:
    with open_stream(running, transport) as slow, open_stream(running, transport) as other:
        assert is_serving(slow)
        assert is_serving(other)
        message, y = request_of(3)
        frame = CallHead(MethodCode.Deconvolve, 30, message).pack()
        send_raw(slow, frame[:-1])
        for _ in range(3):
            assert is_serving(other)
        slow.protocol.send(CallHead(MethodCode.Deconvolve, 30, message))  # as if it had sent it
        send_raw(slow, frame[-1:])
        np.testing.assert_array_equal(y_of(receive_answer(slow)), y)
        assert is_serving(slow)


def test_a_long_call_keeps_nobody_waiting_and_its_connection_is_shared_again(
    running: ServerProcess,
) -> None:
    x, W = np.ones((1, 16, 32, 32), np.float32), np.ones((16, 16, 2, 2), np.float32)
    request = pb.DeconvolveRequest(x=message_from_array(x), w=message_from_array(W))
    header = pb.DeconvolveStreamRequest(
        header=pb.DeconvolveStreamHeader(
            request=pb.DeconvolveRequest(
                x=message_from_spec(spec_of(x)), w=message_from_spec(spec_of(W))
            ),
            slice_samples_count=1,
        )
    )
    with open_stream(running) as long, open_stream(running) as other:
        for _ in range(2):
            assert is_serving(long)
            assert is_serving(other)
            send_call(long, MethodCode.Deconvolve, request.SerializeToString())
            assert is_serving(other)
            assert isinstance(receive_answer(long), Answer)
        assert is_serving(long)
        send_call(long, MethodCode.DeconvolveStream, header.SerializeToString())
        for _ in range(3):
            assert is_serving(other)  # though the server waits for the elements of the other


class Echo:
    """A connection that notes its calls, each a byte, in the order in which they are served."""

    def __init__(self, leaders: LeaderFollowers, served: list[Echo], peer_key: str = "") -> None:
        self.peer_key = peer_key
        self.last_turn = 0
        self.client, self.socket = socket.socketpair()
        self.client.settimeout(_WAIT_S)
        self.descriptor = self.socket.fileno()
        self.on_call: Callable[[], None] = lambda: None
        self.late_count = 0
        self._leaders = leaders
        self._served = served
        self.thread = threading.Thread(target=leaders.serve, args=(self,))
        self.thread.start()

    def serve_alone(self) -> bool:
        return True

    def serve_next(self) -> bool:
        is_open = False
        try:
            byte = self.socket.recv(1)
            if byte:
                self._served.append(self)
                self.on_call()
                self.socket.send(byte)
                is_open = True
        finally:
            if not is_open:
                self._leaders.forget(self)
                self.socket.close()
        return is_open

    def note_late(self) -> None:
        self.late_count += 1

    def send(self) -> None:
        self.client.send(b"x")

    def receive(self) -> None:
        assert self.client.recv(1) == b"x"

    def call(self) -> None:
        self.send()
        self.receive()


def _watch(delay_s: float, action: Callable[[], None]) -> None:
    timer = threading.Timer(delay_s, action)
    timer.daemon = True
    timer.start()


def _wait_for(gate: threading.Event) -> None:
    assert gate.wait(_WAIT_S)


@contextmanager
def echoes(*peers: str, watch: Watch = _watch) -> Iterator[tuple[list[Echo], list[Echo]]]:
    """Give a connection of each of some peers, and the list of those that were served, in order."""
    served: list[Echo] = []
    lost: list[str] = []
    leaders = LeaderFollowers(LastCaller(), watch, lost.append)
    connections = [Echo(leaders, served, peer) for peer in peers]
    try:
        yield connections, served
    finally:
        for each in connections:
            each.client.close()
        for each in connections:
            each.thread.join(_WAIT_S)
        leaders.close()
    assert not lost
    assert not any(each.thread.is_alive() for each in connections)


def test_one_thread_serves_all_small_calls() -> None:
    threads = set()
    with echoes(*"abcd") as (connections, served):
        for each in connections:
            each.call()  # it may be served by a thread that follows later
            each.on_call = lambda: threads.add(threading.get_ident())
        served.clear()
        for _ in range(10):
            for each in connections:
                each.send()
            for each in connections:
                each.receive()
        # nobody was relieved, unless this machine stood still meanwhile
        assert 1 <= len(threads) <= 1 + sum(each.late_count for each in connections)
        assert Counter(served) == dict.fromkeys(connections, 10)


def test_peers_take_turns_and_so_do_their_connections() -> None:
    with echoes(*["many"] * 20, "one", watch=lambda *_: None) as (connections, served):
        *others, holder, one = connections
        for each in connections:  # all are shared, and were served in this order
            each.call()
        gate = threading.Event()
        holder.on_call = lambda: _wait_for(gate)
        served.clear()
        holder.send()
        wait_until(lambda: served == [holder])
        for each in (*reversed(others), one):
            each.send()
        gate.set()
        for each in connections:
            each.receive()

    assert served == [holder, others[0], one, *others[1:]]


def test_a_call_that_lasts_unforeseen_is_left_alone_while_others_are_served() -> None:
    with echoes(*"abc") as (connections, served):
        slow, *others = connections
        for each in connections:
            each.call()
        gate = threading.Event()
        slow.on_call = lambda: _wait_for(gate)
        slow.send()
        wait_until(lambda: served[-1] is slow)
        for _ in range(3):
            for each in others:
                each.call()
        assert slow.late_count >= 1
        gate.set()
        slow.receive()
        for each in connections:
            each.call()


def test_a_connection_that_ends_leaves_the_others_a_leader() -> None:
    with echoes(*"abcdef") as (connections, _):
        for each in connections:
            each.call()
        for number, each in enumerate(connections):
            each.client.close()
            for other in connections[number + 1 :]:
                other.call()


def test_an_unforeseen_error_of_a_call_ends_its_connection_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: seen.set())
    with echoes(*"abc") as (connections, _):
        broken, *others = connections
        for each in connections:
            each.call()

        def fail() -> None:
            raise RuntimeError("a fault of the server's")

        broken.on_call = fail
        broken.send()
        assert seen.wait(_WAIT_S)
        for each in others:
            each.call()
