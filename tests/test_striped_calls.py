"""Striped calls: one call's elements by several direct connections, in any order."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from deconvd.direct import pieces
from deconvd.direct.events import EndOfStream, PieceHead
from deconvd.direct.pieces import PieceSpace
from deconvd.errors import LostTensorError
from deconvd.model.dtypes import ELEMENT_TYPES, Array, DType
from deconvd.model.operation import DECONVOLVE, DECONVOLVE_GRAD, OPERATIONS, Operation
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.stream_parts import PendingElements
from deconvd_server.daemon import DaemonState
from deconvd_server.exit_codes import ExitCode
from tests.direct_calls import get_server_info, is_serving
from tests.processes import wait_until
from tests.servers import server_process
from tests.session_clients import open_session, tensor_by_digest
from tests.striped_calls import (
    SteppingDevice,
    StripedClient,
    StripedServer,
    arrays_of,
    compute_by_message,
    describe,
    empty_results,
    striped_server,
)

PIECE_BYTES = 1000  # no multiple of any element's size but the narrowest's
BOTH = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", PIECE_BYTES)


@pytest.fixture
def server() -> Iterator[StripedServer]:
    with striped_server() as running:
        yield running
        running.wait_until_idle()


def assert_same_bits(results: dict[str, Array], expected: dict[str, Array]) -> None:
    assert results.keys() == expected.keys()
    for field, array in expected.items():
        assert results[field].dtype == array.dtype
        assert results[field].tobytes() == array.tobytes(), field


@BOTH
@pytest.mark.parametrize("dtype", ELEMENT_TYPES, ids=str)
def test_a_striped_call_gives_the_bits_of_a_message(
    server: StripedServer, operation: Operation, dtype: DType
) -> None:
    operands = arrays_of(operation, dtype)
    client = StripedClient(server.port)

    results = client.compute(operation, operands)

    assert_same_bits(results, compute_by_message(server.address, operation, operands))
    client.close()


@BOTH
@pytest.mark.parametrize("stripes_count", [1, 2, 3, 8])
def test_pieces_come_in_any_order_by_any_number_of_stripes(
    server: StripedServer, operation: Operation, stripes_count: int
) -> None:
    operands = arrays_of(operation)
    expected = compute_by_message(server.address, operation, operands)
    client = StripedClient(server.port, stripes_count)
    numbers = [*range(PieceSpace([*operands.values()]).pieces_count)]
    assert len(numbers) > 3
    for seed in range(5):
        random.Random(seed).shuffle(numbers)
        assert_same_bits(client.compute(operation, operands, numbers), expected)
    assert is_serving(client.control)  # and all are connections like any other afterwards
    assert all(map(is_serving, client.stripes))
    client.close()


def test_stripes_may_come_before_their_call(server: StripedServer) -> None:
    operands = arrays_of(DECONVOLVE)
    results = empty_results(DECONVOLVE, operands)
    client = StripedClient(server.port, 3)
    client.join()
    client.send([*operands.values()])
    wait_until(lambda: busy_connections_count(server) == 3)
    client.begin(describe(DECONVOLVE, operands))
    client.receive([*results.values()])
    client.take_answer(DECONVOLVE)

    assert_same_bits(results, compute_by_message(server.address, DECONVOLVE, operands))
    client.close()


def busy_connections_count(server: StripedServer) -> int:
    direct = server.backend._direct
    assert direct is not None
    return sum(not connection.is_idle for connection in direct._all_connections())


def test_a_stripe_may_come_when_all_others_have_sent_everything(server: StripedServer) -> None:
    operands = arrays_of(DECONVOLVE)
    results = empty_results(DECONVOLVE, operands)
    client = StripedClient(server.port, 2)
    client.begin(describe(DECONVOLVE, operands), stripes_count=2)
    late = client.stripes.pop()
    client.join()
    client.send([*operands.values()])
    client.stripes.append(late)
    client.join(late)
    late.send(EndOfStream())
    client.receive([*results.values()])
    client.take_answer(DECONVOLVE)
    client.close()


@BOTH
def test_no_samples_are_no_pieces_of_x(server: StripedServer, operation: Operation) -> None:
    operands = arrays_of(operation, samples_count=0)
    client = StripedClient(server.port)

    results = client.compute(operation, operands)

    assert_same_bits(results, compute_by_message(server.address, operation, operands))
    client.close()


def test_kept_tensors_do_not_travel(server: StripedServer) -> None:
    operands = arrays_of(DECONVOLVE)
    expected = compute_by_message(server.address, DECONVOLVE, operands)
    with open_session(server.address) as session:
        client = StripedClient(server.port)
        fields = {"session": session.session}
        request = describe(DECONVOLVE, operands, keep=pb.OperandsToKeep(x=True, w=True), **fields)
        results = empty_results(DECONVOLVE, operands)
        client.begin(request)
        client.join()
        client.send([*operands.values()])
        client.receive([*results.values()])
        kept = client.take_answer(DECONVOLVE).kept
        assert_same_bits(results, expected)
        np.testing.assert_array_equal(session.get(kept.x.handle), operands["x"])

        for field in ("x", "w"):
            getattr(request, field).resident.CopyFrom(getattr(kept, field))
        request.b.CopyFrom(tensor_by_digest(operands["b"]))
        client.transfer = b"2" * 16
        client.begin(request)
        lost = client.take_failure()
        assert isinstance(lost, LostTensorError)
        assert lost.argument == "b"

        request.ClearField("b")
        request.ClearField("keep")
        request.keep_y = True
        client = StripedClient(server.port)
        client.begin(request)
        client.join()
        client.send([])
        client.receive([])
        y = client.take_answer(DECONVOLVE).y
        bias = operands["b"].reshape(1, -1, 1, 1)
        np.testing.assert_allclose(
            session.get(y.resident.handle) + bias, expected["y"], atol=1e-5, rtol=0
        )
        client.close()
        session.close()


def test_only_wanted_gradients_are_sent(server: StripedServer) -> None:
    operands = arrays_of(DECONVOLVE_GRAD)
    expected = compute_by_message(server.address, DECONVOLVE_GRAD, operands)
    sent = {"gy": operands["gy"], "x": operands["x"]}
    client = StripedClient(server.port)
    wanted = pb.GradientMask(gw=True, gb=True)
    request = describe(DECONVOLVE_GRAD, operands, wanted=wanted)
    client.begin(request)
    client.join()
    client.send([*sent.values()])
    gradients = {field: np.empty_like(expected[field]) for field in ("gw", "gb")}
    client.receive([*gradients.values()])
    client.take_answer(DECONVOLVE_GRAD)
    assert_same_bits(gradients, {field: expected[field] for field in gradients})
    client.close()


def test_results_leave_while_the_call_computes() -> None:
    device = SteppingDevice(noted_bytes=2 * PIECE_BYTES + 7)
    with striped_server(device) as server:
        operands = arrays_of(DECONVOLVE)
        client = StripedClient(server.port, 1)
        (line,) = client.stripes
        client.begin(describe(DECONVOLVE, operands))
        client.join()
        client.send([*operands.values()])
        y = empty_results(DECONVOLVE, operands)["y"]
        space = PieceSpace([y])
        assert space.pieces_count > 3
        number, counts = 0, []
        while number < space.pieces_count:
            if number == 2:
                assert device.has_computed.is_set()
                assert not line.poll(0.1), "a piece came that is not final"
                device.let_go.set()
            assert line.next_event() == PieceHead(number)
            elements = line.next_event()
            assert isinstance(elements, PendingElements)
            counts.append(space.count_in_run(number, elements.size_bytes))
            for buffer in space.buffers(number, counts[-1]):
                line.read_into_buffer(buffer)
            number += counts[-1]
        assert counts[0] == 2, "what is final is one run"
        assert max(counts) == 4
        assert isinstance(line.next_event(), EndOfStream)
        client.take_answer(DECONVOLVE)
        assert_same_bits({"y": y}, compute_by_message(server.address, DECONVOLVE, operands))
        client.close()


# SIGTERM


def drain(server: StripedServer) -> Callable[[], bool]:
    """Have a server drain, and return a function that waits for that and returns whether nothing was cut."""
    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(server.daemon.drain()))
    thread.start()
    direct = server.backend._direct
    assert direct is not None
    wait_until(lambda: direct._is_withdrawn and server.daemon.state is DaemonState.DRAINING)

    def wait() -> bool:
        thread.join()
        return outcome[0]

    return wait


@pytest.mark.parametrize("phase", ["called", "joined", "landing", "computing", "returning"])
def test_a_drain_loses_no_striped_call(phase: str) -> None:
    device = SteppingDevice(noted_bytes=2 * PIECE_BYTES)
    with striped_server(device) as server:
        operands = arrays_of(DECONVOLVE)
        expected = compute_with(device, server, operands)
        results = empty_results(DECONVOLVE, operands)
        space = PieceSpace([*operands.values()])
        client = StripedClient(server.port, 3)
        idle = StripedClient(server.port, 0)
        stranger = StripedClient(server.port, 0, "127.0.0.2")
        waits: list[Callable[[], bool]] = []

        def begin_drain(now: str) -> None:
            if now == phase:
                waits.append(drain(server))
                assert client_is_gone(stranger)

        client.begin(describe(DECONVOLVE, operands))
        wait_until(lambda: server.load[0] == 1)
        begin_drain("called")
        client.join(client.stripes[0])
        wait_until(lambda: busy_connections_count(server) == 2)
        begin_drain("joined")
        client.join(*client.stripes[1:])
        client.send([*operands.values()], [*range(space.pieces_count // 2)], ends=False)
        begin_drain("landing")
        client.send([*operands.values()], [*range(space.pieces_count // 2, space.pieces_count)])
        device.has_computed.wait()
        begin_drain("computing")
        device.let_go.set()
        wait_until(lambda: client.stripes[0].poll(0))
        begin_drain("returning")
        assert client_is_gone(idle)  # no connection stays that the call does not need
        client.receive([*results.values()])
        client.take_answer(DECONVOLVE)

        assert waits[0]()
        assert_same_bits(results, expected)


def compute_with(
    device: SteppingDevice, server: StripedServer, operands: dict[str, Array]
) -> dict[str, Array]:
    device.let_go.set()
    expected = compute_by_message(server.address, DECONVOLVE, operands)
    device.let_go.clear()
    device.has_computed.clear()
    return expected


def client_is_gone(client: StripedClient) -> bool:
    try:
        client.control.next_event()
    except ConnectionError:
        return True
    return False


def test_a_drain_does_not_wait_for_stripes_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deconvd_server.transports.direct.transfers.STRIPE_WAIT_S", 0.05)
    with striped_server() as server:
        client = StripedClient(server.port, 3)
        alone = StripedClient(server.port, 1)
        client.begin(describe(DECONVOLVE, arrays_of(DECONVOLVE)), timeout_s=1)
        alone.join()  # its call has not come
        wait_until(lambda: server.load[0] == 1 and busy_connections_count(server) == 2)
        wait = drain(server)
        assert client_is_gone(alone)
        with pytest.raises(ConnectionError):
            client.stripes[0].next_event()
        wait()


def test_sigterm_in_the_middle_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2 << 20)  # as in the server's process
    operands = arrays_of(DECONVOLVE, samples_count=12000)
    results = empty_results(DECONVOLVE, operands)
    with server_process(tmp_path, "--log-level", "debug", listen=("127.0.0.1:0",)) as server:
        client = StripedClient(get_server_info(server).direct_port)
        client.begin(describe(DECONVOLVE, operands))
        client.join(client.stripes[0])
        wait_until(lambda: "in 2 stripes" in server.log.read_text())
        server.process.terminate()
        wait_until(lambda: "draining" in server.log.read_text())
        client.join(client.stripes[1])
        client.send([*operands.values()])
        received = client.receive([*results.values()])
        client.take_answer(DECONVOLVE)
        assert server.process.wait(30) == ExitCode.DRAINED
    assert sum(map(len, received)) > 2
    assert results["y"].any(axis=(1, 2, 3)).all()
