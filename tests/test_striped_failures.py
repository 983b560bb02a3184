"""Striped calls that go wrong: each ends alone, and everything that was counted for it is given back."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deconvd.direct import pieces
from deconvd.direct.events import EndOfStream, FrameKind, PieceHead, StripeHead, pack_frame
from deconvd.direct.pieces import PieceSpace
from deconvd.errors import (
    DeadlineError,
    ExhaustedError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)
from deconvd.model.operation import DECONVOLVE
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.tensor import message_from_array
from deconvd_server.call.context import CallContext
from deconvd_server.resources.budgets import budgets
from deconvd_server.transports.direct.striped_transfer import StripeMember, StripeState
from tests.direct_calls import connect_stream_from, is_serving
from tests.processes import wait_until
from tests.stream_pairs import send_raw
from tests.striped_calls import (
    SteppingDevice,
    StripedClient,
    StripedServer,
    arrays_of,
    describe,
    empty_results,
    is_closed,
    striped_server,
)

PIECE_BYTES = 1000
OPERANDS = arrays_of(DECONVOLVE)
ARRAYS = [*OPERANDS.values()]
STALL_S = 1.0

FEW_BYTES = 16 << 10
SAMPLES_COUNT = 12_000
"""For results of 17 MB: neither of two stripes ends, however much is buffered at the server's end."""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE_BYTES)


@pytest.fixture
def device() -> SteppingDevice:
    return SteppingDevice()


@pytest.fixture
def server(device: SteppingDevice) -> Iterator[StripedServer]:
    with striped_server(device) as running:
        yield running
        running.wait_until_idle()


@pytest.fixture
def client(server: StripedServer) -> Iterator[StripedClient]:
    client = StripedClient(server.port)
    yield client
    client.close()


def assert_over(client: StripedClient, server: StripedServer, device: SteppingDevice) -> None:
    """Assert that a failed call has left nothing, but for its control connection, which serves on."""
    assert all(map(is_closed, client.stripes))
    server.wait_until_idle()
    device.let_go.set()
    assert is_serving(client.control)


def begin(client: StripedClient, *, timeout_s: float = 30) -> None:
    client.begin(describe(DECONVOLVE, OPERANDS), timeout_s=timeout_s)
    client.join()


# What breaks the rules


def send_a_piece_twice(client: StripedClient) -> None:
    client.send(ARRAYS, [0, 1, 2, 0], ends=False)


def send_a_piece_past_the_end(client: StripedClient) -> None:
    client.stripes[0].send_piece(PieceSpace(ARRAYS).pieces_count, [memoryview(bytes(PIECE_BYTES))])


def send_a_piece_beyond_all_numbers(client: StripedClient) -> None:
    client.stripes[0].send_piece(2**64 - 1, [memoryview(bytes(PIECE_BYTES))])


def send_a_short_piece(client: StripedClient) -> None:
    client.stripes[0].send_piece(0, [memoryview(bytes(PIECE_BYTES - 1))])


def send_a_long_piece(client: StripedClient) -> None:
    client.stripes[0].send_piece(0, [memoryview(bytes(PIECE_BYTES + 1))])


def send_the_last_piece_in_full(client: StripedClient) -> None:
    last = PieceSpace(ARRAYS).pieces_count - 1
    client.stripes[0].send_piece(last, [memoryview(bytes(PIECE_BYTES))])


def send_a_run_with_a_piece_that_came(client: StripedClient) -> None:
    space = PieceSpace(ARRAYS)
    client.stripes[0].send_piece(2, space.buffers(2))
    client.stripes[0].send_piece(1, space.buffers(1, 3))


def send_elements_alone(client: StripedClient) -> None:
    send_raw(client.stripes[0], pack_frame(FrameKind.ELEMENTS, bytes(8)))


def send_two_heads(client: StripedClient) -> None:
    client.stripes[0].send(PieceHead(0))
    client.stripes[0].send(PieceHead(1))


def end_after_a_head(client: StripedClient) -> None:
    client.stripes[0].send(PieceHead(0))
    client.stripes[0].send(EndOfStream())


def end_too_early(client: StripedClient) -> None:
    client.send(ARRAYS, [0, 1, 2])


@pytest.mark.parametrize(
    ("breach", "message"),
    [
        (send_a_piece_twice, "piece 0, or one .*has come before"),
        (send_a_piece_past_the_end, r"piece (\d+) is none of the \1 of the operands"),
        (send_a_piece_beyond_all_numbers, "piece 18446744073709551615 is none of"),
        (send_a_short_piece, "no run of whole pieces begins with piece 0 and has 999 bytes"),
        (send_a_long_piece, "no run of whole pieces begins with piece 0 and has 1001 bytes"),
        (
            send_the_last_piece_in_full,
            r"no run of whole pieces begins with piece \d+ and has 1000 bytes",
        ),
        (send_a_run_with_a_piece_that_came, "piece 1, or one of the 2 behind it, has come before"),
        (send_elements_alone, "must follow a PIECE frame"),
        (send_two_heads, "the elements of piece 0 .* must follow its PIECE frame"),
        (end_after_a_head, "the elements of piece 0 .* must follow its PIECE frame"),
        (end_too_early, r"must have all pieces of its operands: \d+ of \d+ have not come"),
    ],
)
def test_a_client_that_breaks_the_rules_of_pieces_is_told(
    client: StripedClient,
    server: StripedServer,
    device: SteppingDevice,
    breach: Callable[[StripedClient], None],
    message: str,
) -> None:
    begin(client)
    breach(client)
    with pytest.raises(InvalidArgumentError, match=message):
        raise client.take_failure()
    assert_over(client, server, device)


def test_a_frame_that_the_protocol_forbids_breaks_the_stripe(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    begin(client)
    send_raw(client.stripes[1], pack_frame(FrameKind.MESSAGE, bytes(8)))
    assert isinstance(client.take_failure(), UnavailableError)
    assert_over(client, server, device)


def test_elements_in_the_request_are_refused(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    request = describe(DECONVOLVE, OPERANDS)
    request.x.CopyFrom(message_from_array(OPERANDS["x"]))
    client.begin(request)
    client.join()
    with pytest.raises(InvalidArgumentError, match="x must have its elements in the stripes"):
        raise client.take_failure()
    assert_over(client, server, device)


def test_shared_memory_is_refused(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    request = describe(DECONVOLVE, OPERANDS)
    request.x.shared.CopyFrom(pb.SharedSlice(region=bytes(16), offset_bytes=0))
    client.begin(request)
    client.join()
    assert isinstance(client.take_failure(), InvalidArgumentError)
    assert_over(client, server, device)


def test_a_request_that_is_none_is_refused(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    request = describe(DECONVOLVE, OPERANDS)
    request.w.shape[0] += 1
    client.begin(request)
    client.join()
    assert isinstance(client.take_failure(), InvalidArgumentError)
    assert_over(client, server, device)


def test_a_processor_with_another_byte_order_refuses(
    client: StripedClient,
    server: StripedServer,
    device: SteppingDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.byteorder", "big")
    begin(client)
    assert isinstance(client.take_failure(), UnimplementedError)
    assert_over(client, server, device)


# Who may join


def test_a_stripe_too_many_is_closed_and_hurts_nobody(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    begin(client)
    client.send(ARRAYS)
    device.has_computed.wait()
    for line in (connect_stream_from("127.0.0.1", server.port) for _ in range(3)):
        client.join(line)
        assert is_closed(line)
    device.let_go.set()
    client.receive([*empty_results(DECONVOLVE, OPERANDS).values()])
    client.take_answer(DECONVOLVE)


def test_of_stripes_that_came_before_the_call_the_first_stay(
    server: StripedServer, device: SteppingDevice
) -> None:
    client = StripedClient(server.port, 4)
    device.let_go.set()
    for count in range(4):
        client.join(client.stripes[count])
        wait_until(partial(is_member_number, server, count + 1))
    late = client.stripes[2:]
    del client.stripes[2:]
    client.begin(describe(DECONVOLVE, OPERANDS))
    assert all(map(is_closed, late))
    client.send(ARRAYS)
    client.receive([*empty_results(DECONVOLVE, OPERANDS).values()])
    client.take_answer(DECONVOLVE)
    client.close()


def is_member_number(server: StripedServer, count: int) -> bool:
    return members_count(server) == count


def members_count(server: StripedServer) -> int:
    return len(members_of(server))


def members_of(server: StripedServer) -> list[StripeMember]:
    direct = server.backend._direct
    assert direct is not None
    transfers = direct._transfers._transfers.values()
    return [member for transfer in transfers for member in transfer._members]


def test_a_stripe_whose_call_never_comes_is_closed(
    server: StripedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd_server.transports.direct.stripe.STRIPE_WAIT_S", 0.05)
    line = connect_stream_from("127.0.0.1", server.port)
    line.send(StripeHead(secrets.token_bytes(16)))
    assert is_closed(line)
    direct = server.backend._direct
    assert direct is not None
    wait_until(lambda: len(direct._transfers._transfers) == 0)


def test_a_stripe_that_waits_for_its_call_ends_with_its_client(server: StripedServer) -> None:
    line = connect_stream_from("127.0.0.1", server.port)
    line.send(StripeHead(secrets.token_bytes(16)))
    wait_until(lambda: members_count(server) == 1)
    line.close()
    wait_until(lambda: members_count(server) == 0)


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_call_whose_stripes_do_not_come_ends(
    client: StripedClient,
    server: StripedServer,
    device: SteppingDevice,
    monkeypatch: pytest.MonkeyPatch,
    is_computed: bool,
) -> None:
    monkeypatch.setattr("deconvd_server.transports.direct.striped_transfer.STRIPE_WAIT_S", 0.5)
    device.let_go.set()
    lacking = client.stripes.pop()
    client.begin(describe(DECONVOLVE, OPERANDS), stripes_count=2)
    client.join()
    client.send(ARRAYS, None if is_computed else [0], ends=is_computed)
    if is_computed:
        client.receive([*empty_results(DECONVOLVE, OPERANDS).values()])
        client.take_answer(DECONVOLVE)
    else:
        with pytest.raises(UnavailableError, match="lacks 1 of its connections after"):
            raise client.take_failure()
    server.wait_until_idle()
    assert is_serving(client.control)
    client.join(lacking)
    assert is_closed(lacking)


def test_an_id_is_used_once(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    begin(client)
    client.send(ARRAYS)
    device.has_computed.wait()
    other = StripedClient(server.port, 1)
    other.transfer = client.transfer
    other.begin(describe(DECONVOLVE, OPERANDS))
    assert is_closed(other.control)
    device.let_go.set()
    client.receive([*empty_results(DECONVOLVE, OPERANDS).values()])
    client.take_answer(DECONVOLVE)
    client.begin(describe(DECONVOLVE, OPERANDS))
    assert is_closed(client.control)
    client.join(other.stripes[0])  # a call that has ended takes no stripe
    assert is_closed(other.stripes[0])


def test_another_peer_cannot_join(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    client.begin(describe(DECONVOLVE, OPERANDS))
    stranger = StripedClient(server.port, 1, "127.0.0.2")
    stranger.transfer = client.transfer
    wait_until(lambda: server.load[0] == 1)
    stranger.join()  # it waits for a call of its own: no peer can tell which ids others use
    direct = server.backend._direct
    assert direct is not None
    wait_until(lambda: len(direct._transfers._transfers) == 2)
    assert members_count(server) == 1
    client.join()
    client.send(ARRAYS)
    device.let_go.set()
    client.receive([*empty_results(DECONVOLVE, OPERANDS).values()])
    client.take_answer(DECONVOLVE)
    stranger.close()


def test_ids_of_calls_that_have_ended_are_forgotten_in_the_end(
    client: StripedClient,
    server: StripedServer,
    device: SteppingDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deconvd_server.transports.direct.transfers._ENDED_COUNT", 3)
    device.let_go.set()
    for _ in range(10):
        client.compute(DECONVOLVE, OPERANDS)
    direct = server.backend._direct
    assert direct is not None
    # the last one's results have come, and its id is forgotten a moment later
    wait_until(lambda: len(direct._transfers._transfers) == 3)


# What breaks


@pytest.mark.parametrize("phase", ["joining", "landing", "computing", "returning"])
@pytest.mark.parametrize("end", ["stripe", "control"])
def test_a_connection_that_breaks_ends_its_call(
    client: StripedClient, server: StripedServer, device: SteppingDevice, phase: str, end: str
) -> None:
    device.noted_bytes = 2 * PIECE_BYTES
    if phase == "joining":
        client.begin(describe(DECONVOLVE, OPERANDS))
        client.join(client.stripes[0])
        client.stripes.pop().close()  # it has not joined: nobody but its client closes it
    else:
        begin(client)
    if phase == "landing":
        client.send(ARRAYS, range(3), ends=False)
        client.stripes[0].send(PieceHead(3))  # and only a part of its elements
        send_raw(client.stripes[0], pack_frame(FrameKind.ELEMENTS, bytes(PIECE_BYTES))[:500])
    elif phase != "joining":
        client.send(ARRAYS)
        device.has_computed.wait()
    if phase == "returning":
        wait_until(lambda: any(line.poll(0) for line in client.stripes))
    wait_until(lambda: server.load[0] == 1)
    broken = client.stripes[0] if end == "stripe" else client.control
    broken.close()
    if end == "stripe":
        failure = client.take_failure()
        assert isinstance(failure, UnavailableError)
        assert failure.retry_after_s
        del client.stripes[0]
        assert all(map(is_closed, client.stripes))
        server.wait_until_idle()
        device.let_go.set()
        assert is_serving(client.control)
    else:
        assert all(map(is_closed, client.stripes))


def test_a_call_that_fails_while_its_results_leave_closes_its_stripes(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    device.noted_bytes = 2 * PIECE_BYTES

    def fail() -> None:
        raise ExhaustedError("no memory is left for the rest")

    device.fail = fail
    begin(client)
    client.send(ARRAYS)
    device.has_computed.wait()
    wait_until(lambda: client.stripes[0].poll(0) or client.stripes[1].poll(0))
    device.let_go.set()
    with pytest.raises(ExhaustedError, match="no memory is left for the rest"):
        raise client.take_failure()
    device.fail = lambda: None
    assert_over(client, server, device)


def test_an_unforeseen_error_is_told_as_one(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    device.fail = fail
    device.let_go.set()
    begin(client)
    client.send(ARRAYS)
    assert isinstance(client.take_failure(), InternalError)
    device.fail = lambda: None
    assert_over(client, server, device)


@pytest.mark.parametrize("phase", ["calling", "landing", "computing"])
def test_a_deadline_is_kept(
    client: StripedClient, server: StripedServer, device: SteppingDevice, phase: str
) -> None:
    client.begin(describe(DECONVOLVE, OPERANDS), timeout_s=0.5)
    if phase != "calling":
        client.join()
        client.send(ARRAYS, [0, 1] if phase == "landing" else None, ends=phase == "computing")
    assert isinstance(client.take_failure(), DeadlineError)
    for line in () if phase != "calling" else client.stripes:
        client.join(line)
    assert_over(client, server, device)


def test_a_client_that_does_not_take_its_results_has_a_deadline(device: SteppingDevice) -> None:
    device.let_go.set()
    with striped_server(device) as server:
        client = StripedClient(server.port, receive_buffer_bytes=FEW_BYTES)
        operands = arrays_of(DECONVOLVE, samples_count=SAMPLES_COUNT)
        client.begin(describe(DECONVOLVE, operands), timeout_s=6)
        client.join()
        client.send([*operands.values()])
        client.take_answer(DECONVOLVE)
        server.wait_until_idle()
        assert all(map(is_closed, client.stripes))
        assert is_serving(client.control)
        client.close()


def test_what_never_fits_is_refused(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    request = describe(DECONVOLVE, OPERANDS)
    request.x.shape[0] = 1 << 30
    client.begin(request)
    client.join()
    with pytest.raises(ExhaustedError, match="memory for streams"):
        raise client.take_failure()
    assert_over(client, server, device)


def test_nothing_is_received_before_its_memory_is_admitted(
    client: StripedClient, server: StripedServer, device: SteppingDevice
) -> None:
    admission = server.backend.stream_admission
    is_held, let_go = threading.Event(), threading.Event()

    def hold() -> None:
        with admission.admit(budgets().streams_bytes, CallContext(30)):
            is_held.set()
            let_go.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()
    begin(client)
    client.send(ARRAYS)
    wait_until(lambda: admission.load.waiting_count == 1 and members_count(server) == 2)
    assert all(member.state is StripeState.WAITING for member in members_of(server))
    let_go.set()
    holder.join()
    device.let_go.set()
    client.receive([*empty_results(DECONVOLVE, OPERANDS).values()])
    client.take_answer(DECONVOLVE)


# What stalls


@pytest.mark.parametrize("phase", ["joining", "landing", "returning"])
def test_a_client_that_stalls_holds_nobody(
    device: SteppingDevice, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    monkeypatch.setattr("deconvd_server.service.stream_admission.STALL_LIMIT_S", STALL_S)
    device.let_go.set()
    with striped_server(device) as server:
        stalled = StripedClient(server.port, receive_buffer_bytes=FEW_BYTES)
        operands = arrays_of(DECONVOLVE, samples_count=SAMPLES_COUNT)
        stalled.begin(describe(DECONVOLVE, operands))
        stalled.join(stalled.stripes[0])
        if phase != "joining":
            stalled.join(stalled.stripes[1])
            numbers = None if phase == "returning" else [0, 1, 3]
            stalled.send([*operands.values()], numbers, ends=phase == "returning")
        if phase == "landing":
            stalled.stripes[0].send(PieceHead(2))
            send_raw(stalled.stripes[0], pack_frame(FrameKind.ELEMENTS, bytes(PIECE_BYTES))[:500])
        other = StripedClient(server.port)
        other.compute(DECONVOLVE, OPERANDS)  # meanwhile
        other.close()
        if phase == "returning":
            stalled.take_answer(DECONVOLVE)
        else:
            with pytest.raises(UnavailableError, match="made no progress"):
                raise stalled.take_failure()
        server.wait_until_idle()
        assert is_closed(stalled.stripes[0])
        assert is_serving(stalled.control)
        stalled.close()


def test_a_call_that_computes_does_not_stall(
    client: StripedClient,
    server: StripedServer,
    device: SteppingDevice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("deconvd_server.service.stream_admission.STALL_LIMIT_S", STALL_S)
    begin(client)
    client.send(ARRAYS)
    device.has_computed.wait()
    assert not client.control.poll(2 * STALL_S)
    device.let_go.set()
    client.receive([*empty_results(DECONVOLVE, OPERANDS).values()])
    client.take_answer(DECONVOLVE)


def test_a_stripe_that_is_preempted_ends_its_call(
    device: SteppingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deconvd_server.transports.direct.server._CONNECTIONS_COUNT", 4)
    monkeypatch.setattr("deconvd_server.transports.direct.server._RESERVED_CONNECTIONS_COUNT", 0)
    with striped_server(device) as server:
        client = StripedClient(server.port, 3)
        client.begin(describe(DECONVOLVE, OPERANDS))
        wait_until(lambda: server.load[0] == 1)
        client.join()
        wait_until(lambda: members_count(server) == 3)
        client.send(ARRAYS, [0], ends=False)
        stranger = connect_stream_from("127.0.0.2", server.port)
        # the oldest connection is preempted: the control connection, so all stripes end
        assert all(map(is_closed, client.stripes))
        server.wait_until_idle()
        device.let_go.set()
        assert is_serving(stranger)


# Anything at all


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[StripedServer]:
    device = SteppingDevice()
    device.let_go.set()
    with striped_server(device) as running:
        yield running


FRAMES = st.lists(
    st.tuples(st.sampled_from(FrameKind), st.binary(max_size=40))
    | st.tuples(st.just(FrameKind.PIECE), st.integers(0, 9).map(lambda n: n.to_bytes(8, "little")))
    | st.tuples(st.just(FrameKind.ELEMENTS), st.just(bytes(1000))),
    max_size=8,
)


@settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    max_examples=60,
)
@given(by_control=FRAMES, by_stripe=FRAMES, joins=st.booleans())
def test_frames_that_make_no_sense_hurt_nobody(
    fuzzed: StripedServer,
    by_control: list[tuple[FrameKind, bytes]],
    by_stripe: list[tuple[FrameKind, bytes]],
    joins: bool,
) -> None:
    client = StripedClient(fuzzed.port, 2)
    client.begin(describe(DECONVOLVE, OPERANDS))
    if joins:
        client.join()
    for frames, line in ((by_stripe, client.stripes[0]), (by_control, client.control)):
        with suppress(ConnectionError):  # the server has closed it
            for kind, payload in frames:
                send_raw(line, pack_frame(kind, payload))
    client.close()
    fuzzed.wait_until_idle()
    other = StripedClient(fuzzed.port)
    other.compute(DECONVOLVE, OPERANDS)
    other.close()
