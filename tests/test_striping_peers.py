"""Striped calls to servers that are scripted: whatever a server sends, a call ends, right or with an error."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deconvd.direct import pieces
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import (
    ANY_INSTANCE,
    Answer,
    CallFailure,
    EndOfStream,
    FrameKind,
    Hello,
    MethodCode,
    PieceHead,
    StripedCallHead,
    StripeHead,
    pack_frame,
)
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.pieces import PieceSpace
from deconvd.errors import (
    CallCancelledError,
    DeadlineError,
    DeconvdError,
    ExhaustedError,
    InvalidArgumentError,
    LostTensorError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.model.dtypes import Array
from deconvd.wire.status import status_from_error
from deconvd.wire.stream_parts import PendingElements
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.transport import NotServedDirectlyError, StripedAttempt
from deconvd_client.transports.direct import striped_call
from deconvd_client.transports.direct.connectors import InfoFetcher
from deconvd_client.transports.direct.pool import DirectTransport
from deconvd_client.transports.direct.striped_transport import StripedTransport
from tests.processes import wait_until
from tests.stream_pairs import client_stream, send_raw, server_stream

PIECE_BYTES = 1000
"""Pieces of these tests: small, so that there are many."""

OPERANDS = [np.arange(n, dtype=np.uint8) for n in (1, 2500, 0, 4000)]
"""7 pieces, some of which have parts of two operands."""

ANSWER = Answer(b"response", "server_us=1")

Script = Callable[["ScriptedServer", FrameStream], None]
"""What a server does on a stripe once the client has sent its part."""


class ScriptedServer:
    """A server in threads of this process, and the connector to it.

    Attributes:
        heads: The striped calls that came.
        operands: The elements that came with the last one.

    Args:
        script: What it does on each stripe; by default it sends the operands back.
        answer: What it answers, or the bytes that it sends instead; None for nothing.
        connections_count: How many connections it accepts.
    """

    is_address_known = True

    def __init__(
        self,
        script: Script | None = None,
        answer: Answer | DeconvdError | bytes | None = ANSWER,
        connections_count: int = 100,
    ) -> None:
        self._script = script or ScriptedServer.send_back
        self._answer = answer
        self.connections_left_count = connections_count
        self.heads: list[StripedCallHead] = []
        self.operands = np.zeros(sum(a.nbytes for a in OPERANDS), np.uint8)
        self._space = PieceSpace([self.operands])
        self._numbers = iter(range(self._space.pieces_count))
        self._landed_count = 0
        self.has_landed = threading.Event()
        self._lock = (
            threading.Lock()
        )  # a client opens connections in the background, also when this closes
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        self._ends: list[FrameStream] = []

    def connect(self, fetch_info: InfoFetcher, timeout_s: float) -> FrameStream:
        """See `Connector`."""
        if self.connections_left_count <= 0:
            raise ConnectionRefusedError("that many connections are enough")
        self.connections_left_count -= 1
        one, other = socket.socketpair()
        client, server = client_stream(one), server_stream(other)
        for sender, receiver in ((client, server), (server, client)):
            sender.send(Hello(ANY_INSTANCE))
            receiver.next_event()
        with self._lock:
            if self._is_closed:
                client.close()
                server.close()
                raise ConnectionRefusedError("the server has closed")
            self._ends.append(server)
            thread = threading.Thread(target=self._serve, args=(server,))
            self._threads.append(thread)
            thread.start()
        return client

    def close(self) -> None:
        self.has_landed.set()
        with self._lock:
            self._is_closed = True
        for end in self._ends:
            end.shutdown()
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def send_back(self, stripe: FrameStream) -> None:
        self.has_landed.wait()
        for number in self._numbers:
            self.send_piece(stripe, number)
        stripe.send(EndOfStream())

    def send_piece(self, stripe: FrameStream, number: int) -> None:
        stripe.send_piece(number, self._space.buffers(number))

    def _serve(self, connection: FrameStream) -> None:
        with suppress(ConnectionBrokenError):
            while True:
                head = connection.next_event()
                if isinstance(head, StripedCallHead):
                    self.heads.append(head)
                    if isinstance(self._answer, DeconvdError):
                        connection.send(CallFailure(status_from_error(self._answer)))
                    elif isinstance(self._answer, bytes):
                        send_raw(connection, self._answer)
                        connection.shutdown()
                    elif self._answer is not None:
                        self.has_landed.wait()
                        connection.send(self._answer)
                else:
                    assert isinstance(head, StripeHead)
                    self._land(connection)
                    self._script(self, connection)

    def _land(self, stripe: FrameStream) -> None:
        while isinstance(head := stripe.next_event(), PieceHead):
            elements = stripe.next_event()
            assert isinstance(elements, PendingElements)
            count = self._space.count_in_run(head.number, elements.size_bytes)
            for buffer in self._space.buffers(head.number, count):
                stripe.read_into_buffer(buffer)
            self._landed_count += count
        if self._landed_count >= self._space.pieces_count:  # of several calls at once
            self.has_landed.set()


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(striped_call, "_REASON_TIMEOUT_S", 0.2)


MakeServer = Callable[..., ScriptedServer]


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    servers: list[ScriptedServer] = []

    def make(*arguments: Any, **options: Any) -> ScriptedServer:
        servers.append(ScriptedServer(*arguments, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


def transports_to(server: ScriptedServer) -> tuple[DirectTransport, StripedTransport]:
    def fetch_nothing() -> Any:
        raise AssertionError("the address is known")

    direct = DirectTransport(server, fetch_nothing)  # type: ignore[arg-type]
    return direct, StripedTransport(direct)


def call(
    striped: StripedTransport,
    results: list[Array],
    *,
    timeout_s: float = 30,
    stripes_count: int = 4,
) -> Answer:
    attempt = StripedAttempt(MethodCode.Deconvolve, b"request", OPERANDS, results)
    return striped.call(lambda: attempt, Deadline(timeout_s), stripes_count)


def new_results() -> list[Array]:
    """Return memory for what comes back: as many bytes, in other arrays."""
    total_bytes = sum(a.nbytes for a in OPERANDS)
    return [np.zeros(100, np.uint8), np.zeros(0, np.uint8), np.zeros(total_bytes - 100, np.uint8)]


@pytest.mark.parametrize("stripes_count", [2, 4, 8])
def test_all_elements_get_there_and_back(make_server: MakeServer, stripes_count: int) -> None:
    server = make_server()
    direct, striped = transports_to(server)
    results = new_results()
    answer = call(striped, results, stripes_count=stripes_count)
    assert answer == ANSWER
    np.testing.assert_array_equal(np.concatenate(results), np.concatenate(OPERANDS))
    (head,) = server.heads
    assert (head.method, head.message) == (MethodCode.Deconvolve, b"request")
    assert head.stripes_count == stripes_count
    assert len(head.transfer) == 16
    assert str(direct) == f"{stripes_count + 1} direct connections"
    direct.close()


def test_connections_are_used_again(make_server: MakeServer) -> None:
    server = make_server(lambda _, stripe: stripe.send(EndOfStream()))
    direct, striped = transports_to(server)
    for _ in range(3):
        call(striped, [])
    assert server.connections_left_count == 100 - 5
    assert len({head.transfer for head in server.heads}) == 3
    direct.close()


def _twice(server: ScriptedServer, stripe: FrameStream) -> None:
    for _ in range(2):
        server.send_piece(stripe, 3)
    stripe.send(EndOfStream())


def _beyond_the_last(server: ScriptedServer, stripe: FrameStream) -> None:
    stripe.send_piece(7, [memoryview(bytes(PIECE_BYTES))])


def _too_short(server: ScriptedServer, stripe: FrameStream) -> None:
    stripe.send_piece(0, [memoryview(bytes(PIECE_BYTES - 1))])


def _too_long(server: ScriptedServer, stripe: FrameStream) -> None:
    stripe.send_piece(0, [memoryview(bytes(PIECE_BYTES + 1))])


def _without_a_number(server: ScriptedServer, stripe: FrameStream) -> None:
    send_raw(stripe, pack_frame(FrameKind.ELEMENTS, bytes(PIECE_BYTES)))


def _without_elements(server: ScriptedServer, stripe: FrameStream) -> None:
    send_raw(stripe, PieceHead(0).pack() + EndOfStream().pack())


def _not_all(server: ScriptedServer, stripe: FrameStream) -> None:
    stripe.send(EndOfStream())


def _half_a_piece(server: ScriptedServer, stripe: FrameStream) -> None:
    head = PieceHead(0).pack() + pack_frame(FrameKind.ELEMENTS, bytes(PIECE_BYTES))
    send_raw(stripe, head[: -PIECE_BYTES // 2])
    stripe.shutdown()


def _a_message(server: ScriptedServer, stripe: FrameStream) -> None:
    send_raw(stripe, pack_frame(FrameKind.MESSAGE, b""))


def _noise(server: ScriptedServer, stripe: FrameStream) -> None:
    send_raw(stripe, b"SSH-2.0-OpenSSH_9.2\r\n")


def _nothing(server: ScriptedServer, stripe: FrameStream) -> None:
    stripe.shutdown()


NONSENSE = pytest.mark.parametrize(
    "script",
    [
        _twice,
        _beyond_the_last,
        _too_short,
        _too_long,
        _without_a_number,
        _without_elements,
        _not_all,
        _half_a_piece,
        _a_message,
        _noise,
        _nothing,
    ],
)


@NONSENSE
@pytest.mark.parametrize("is_answered", [True, False])
def test_nonsense_in_stripes_leads_to_another_way(
    make_server: MakeServer,
    monkeypatch: pytest.MonkeyPatch,
    script: Script,
    is_answered: bool,
) -> None:
    # on a busy machine, too, the call gets all its stripes
    monkeypatch.setattr("deconvd_client.transports.direct.striped_transport._PATIENCE_S", 10.0)
    answer = Answer(b"", "") if is_answered else None
    direct, striped = transports_to(make_server(script, answer))
    if script is _not_all and not is_answered:
        # the stripes are as they should be, and the server may still compute
        with pytest.raises(DeadlineError):
            call(striped, new_results(), timeout_s=0.5)
        return
    with pytest.raises(NotServedDirectlyError):
        call(striped, new_results())
    assert not striped.may_carry  # for a while
    assert not [known for known in direct._busy if known() is not None]
    direct.close()


def test_what_broke_stripes_leave_is_free_without_the_garbage_collector(
    make_server: MakeServer,
) -> None:
    direct, striped = transports_to(make_server(_twice, None))
    results = new_results()
    known = [weakref.ref(result) for result in results]
    gc.collect()
    gc.disable()
    try:
        with suppress(NotServedDirectlyError):
            call(striped, results)
        results.clear()
        wait_until(lambda: not any(reference() is not None for reference in known))
    finally:
        gc.enable()
    direct.close()


@pytest.mark.parametrize("is_stripe_broken", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        InvalidArgumentError("W is wrong", argument="W"),
        LostTensorError("W is lost", argument="W"),
        CallCancelledError("the server stops"),
        DeadlineError("too late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_the_servers_error_is_raised_whatever_the_stripes_say(
    make_server: MakeServer,
    error: DeconvdError,
    is_stripe_broken: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(striped_call, "_REASON_TIMEOUT_S", 20.0)
    script = _nothing if is_stripe_broken else ScriptedServer.send_back
    direct, striped = transports_to(make_server(script, error))
    with pytest.raises(type(error), match=str(error)):
        call(striped, new_results())
    assert striped.may_carry
    assert str(direct) == "1 direct connection"  # that of the call, which said why
    direct.close()


@pytest.mark.parametrize(
    ("error", "is_pausing"),
    [
        (ExhaustedError("too large"), False),
        (UnavailableError("a stripe broke", retry_after_s=0.1), True),
        (UnimplementedError("no stripes here"), True),
    ],
    ids=["exhausted", "unavailable", "unimplemented"],
)
def test_a_server_that_refuses_stripes_gets_the_call_in_another_way(
    make_server: MakeServer, error: DeconvdError, is_pausing: bool
) -> None:
    direct, striped = transports_to(make_server(answer=error))
    with pytest.raises(NotServedDirectlyError):
        call(striped, new_results())
    assert striped.may_carry != is_pausing
    assert direct.may_carry
    direct.close()


def test_a_call_with_too_few_connections_goes_another_way(make_server: MakeServer) -> None:
    server = make_server(connections_count=2)
    direct, striped = transports_to(server)
    with pytest.raises(NotServedDirectlyError):
        call(striped, new_results())
    assert not server.heads
    assert striped.may_carry
    assert direct.may_connect
    assert str(direct) == "2 direct connections"
    direct.close()


@pytest.mark.parametrize(("connections_count", "stripes_count"), [(3, 2), (4, 3)])
def test_a_call_makes_do_with_fewer_stripes(
    make_server: MakeServer, connections_count: int, stripes_count: int
) -> None:
    server = make_server(connections_count=connections_count)
    direct, striped = transports_to(server)
    results = new_results()
    call(striped, results)
    np.testing.assert_array_equal(np.concatenate(results), np.concatenate(OPERANDS))
    assert [head.stripes_count for head in server.heads] == [stripes_count]
    direct.close()


def _silence(server: ScriptedServer, stripe: FrameStream) -> None:
    with suppress(ConnectionBrokenError):
        stripe.next_event()


@pytest.mark.parametrize("answer", [None, Answer(b"", "")], ids=["silent", "answered"])
def test_a_deadline_ends_a_call(make_server: MakeServer, answer: Answer | None) -> None:
    direct, striped = transports_to(make_server(_silence, answer))
    begin_s = time.monotonic()
    with pytest.raises(DeadlineError):
        call(striped, new_results(), timeout_s=0.3)
    assert 0.3 <= time.monotonic() - begin_s < 20
    direct.close()


@pytest.mark.parametrize("answer", [None, Answer(b"", "")], ids=["silent", "answered"])
def test_closing_the_transport_ends_a_call(make_server: MakeServer, answer: Answer | None) -> None:
    server = make_server(_silence, answer)
    direct, striped = transports_to(server)
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(call, striped, new_results())
        server.has_landed.wait()
        direct.close()
        with pytest.raises(CallCancelledError):
            endless.result()
    assert str(direct) == "no direct connection"


def test_results_are_left_alone_once_a_call_has_failed(make_server: MakeServer) -> None:
    may_send = threading.Event()

    def send_later(server: ScriptedServer, stripe: FrameStream) -> None:
        may_send.wait()
        server.send_back(stripe)

    direct, striped = transports_to(make_server(send_later, None))
    results = new_results()
    with pytest.raises(DeadlineError):
        call(striped, results, timeout_s=0.2)
    may_send.set()
    direct.close()
    assert not any(result.any() for result in results)


@pytest.fixture
def _no_wait_for_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(striped_call, "_REASON_TIMEOUT_S", 0.01)


@pytest.mark.usefixtures("_no_wait_for_a_reason")
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), is_control=st.booleans())
def test_any_bytes_from_the_server_end_a_call(
    make_server: MakeServer, data: bytes, is_control: bool
) -> None:
    def send_it(server: ScriptedServer, stripe: FrameStream) -> None:
        send_raw(stripe, data)
        stripe.shutdown()

    script, answer = (ScriptedServer.send_back, data) if is_control else (send_it, None)
    direct, striped = transports_to(make_server(script, answer))
    with pytest.raises((NotServedDirectlyError, DeconvdError)):
        call(striped, new_results())
    direct.close()


def test_calls_of_several_threads_share_the_connections(make_server: MakeServer) -> None:
    server = make_server(lambda _, stripe: stripe.send(EndOfStream()))
    direct, striped = transports_to(server)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(partial(_call_if_carried, striped)) for _ in range(40)]
        carried_count = sum(ended.result() for ended in calls)
    assert carried_count == len(server.heads) > 0
    assert not [known for known in direct._busy if known() is not None]
    direct.close()


def _call_if_carried(striped: StripedTransport) -> bool:
    try:
        call(striped, [])
    except NotServedDirectlyError:
        return False
    return True
