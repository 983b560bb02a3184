"""Clients that stall in the middle of a striped call: they hold nobody, and what they hold is given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError, ConnectionClosedError
from deconvd.direct.events import Answer, CallFailure
from deconvd.direct.frame_stream import FrameStream
from deconvd.errors import UnavailableError
from deconvd.wire.status import error_from_status
from tests.direct_calls import get_server_info
from tests.processes import ProcessResources, memory_bytes, process_resources, wait_until
from tests.servers import ServerProcess, server_process
from tests.stream_pairs import send_raw
from tests.striped_calls import LARGE, TWICE, StripedCall, striped_call

STALL_S = 1.0

PATIENCE_S = 15.0
"""More than others take for their calls, on a busy machine; half of what a server waits for one that stalls."""

SMALL = LARGE[:1, :, :2]

STALLED_COUNT = 16
"""As many as run at once."""


Stall = Callable[[StripedCall], list[FrameStream]]
"""Begins a call, and stops somewhere. Returns the lines that are in the call."""


def send_no_stripe(call: StripedCall) -> list[FrameStream]:
    call.send_call()
    return [call.control]


def lack_a_stripe(call: StripedCall) -> list[FrameStream]:
    call.send_call()
    present = call.stripes[:1]
    call.join(present)
    call.send_pieces(stripes=present)
    call.end_pieces(present)
    return [call.control, *present]


def stop_in_a_piece(call: StripedCall) -> list[FrameStream]:
    call.send_call()
    call.join()
    (elements,) = call.operands.buffers(1)
    head = call.stripes[0].protocol.begin_piece(1, len(elements))
    send_raw(call.stripes[0], head + bytes(elements[: len(elements) // 2]))
    return [call.control, *call.stripes]


def stop_in_a_head(call: StripedCall) -> list[FrameStream]:
    call.send_call()
    call.join()
    call.send_pieces([0])
    send_raw(call.stripes[1], call.stripes[1].protocol.begin_piece(1, 1)[:5])
    return [call.control, *call.stripes]


def stop_between_pieces(call: StripedCall) -> list[FrameStream]:
    call.send_call()
    call.join()
    call.send_pieces([0, 1])
    return [call.control, *call.stripes]


def lack_an_end(call: StripedCall) -> list[FrameStream]:
    call.send_call()
    call.join()
    call.send_pieces()
    call.end_pieces(call.stripes[:1])
    return [call.control, *call.stripes]


def read_no_results(call: StripedCall) -> list[FrameStream]:
    call.send_call()
    call.join()
    call.send_pieces()
    call.end_pieces()
    return [call.control, *call.stripes]


STALLS = pytest.mark.parametrize(
    "stall",
    [
        send_no_stripe,
        lack_a_stripe,
        stop_in_a_piece,
        stop_in_a_head,
        stop_between_pieces,
        lack_an_end,
        read_no_results,
    ],
)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that waits for clients for a second where others wait for half a minute."""
    constants = {
        "deconvd_server.call.context:STALL_LIMIT_S": STALL_S,
        "deconvd_server.transports.direct.transfers:STRIPE_WAIT_S": STALL_S,
    }
    directory = tmp_path_factory.mktemp("hasty")
    with server_process(directory, listen=("unix", "127.0.0.1:0"), constants=constants) as server:
        yield server
        assert "unforeseen" not in server.log.read_text()


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(
        tmp_path_factory.mktemp("patient"), listen=("unix", "127.0.0.1:0")
    ) as server:
        yield server
        assert "unforeseen" not in server.log.read_text()


def port_of(server: ServerProcess) -> int:
    return get_server_info(server).direct_port


def wait_until_closed(line: FrameStream) -> None:
    """Read what the server has sent on a line, until it closes it."""
    line.set_deadline(PATIENCE_S)
    rest = memoryview(bytearray(1 << 20))
    with suppress(ConnectionClosedError):
        while True:
            line._stream.read_into(rest)


def assert_is_served(port: int, host: str = "127.0.0.1") -> None:
    """Make a striped call, and see that it ends well and soon."""
    with striped_call(port, host=host) as call:
        for line in (call.control, *call.stripes):
            line.set_deadline(PATIENCE_S)
        np.testing.assert_array_equal(call.run(), 2 * LARGE)


@STALLS
def test_a_client_that_stalls_is_ended_and_its_memory_given_back(
    hasty: ServerProcess, stall: Stall
) -> None:
    port, pid = port_of(hasty), hasty.process.pid
    assert_is_served(port)
    before = process_resources(pid)

    with striped_call(port) as call:
        control, *stripes = stall(call)
        control.set_deadline(PATIENCE_S)
        event = call.receive_answer()
        if stall is read_no_results:  # the answer comes before them, or is a failure
            assert isinstance(event, (Answer, CallFailure))
        else:
            assert isinstance(event, CallFailure)
            assert isinstance(error_from_status(event.status), UnavailableError)
        for stripe in stripes:
            wait_until_closed(stripe)
        wait_until(lambda: memory_bytes(pid) < before.memory_bytes + LARGE.nbytes // 2)

    assert_gone(pid, before)
    assert_is_served(port)


def test_stripes_whose_call_does_not_come_are_ended(hasty: ServerProcess) -> None:
    port, pid = port_of(hasty), hasty.process.pid
    assert_is_served(port)
    before = process_resources(pid)

    with striped_call(port) as call:
        call.join()
        for stripe in call.stripes:
            wait_until_closed(stripe)

    assert_gone(pid, before)
    assert_is_served(port)


def assert_gone(pid: int, before: ProcessResources) -> None:
    """See that the server holds no more than before."""
    wait_until(lambda: process_resources(pid).threads_count <= before.threads_count)
    wait_until(lambda: process_resources(pid).descriptors_count <= before.descriptors_count)


@STALLS
def test_clients_that_stall_keep_nobody_waiting(patient: ServerProcess, stall: Stall) -> None:
    port = port_of(patient)
    with ExitStack() as stack:
        for _ in range(STALLED_COUNT):
            call = stack.enter_context(striped_call(port, host="127.0.0.2"))
            with suppress(ConnectionBrokenError):  # one that must wait for its memory
                for line in call.stripes:
                    line.set_deadline(0.5)
                stall(call)
        began_s = time.monotonic()
        assert_is_served(port)
        for transport in ("tcp", "grpc"):
            target = patient.targets[1]
            with deconvd_client.connect(target, transport=transport, timeout_s=PATIENCE_S) as F:
                np.testing.assert_array_equal(F.deconvolution_2d(LARGE, TWICE), 2 * LARGE)
                np.testing.assert_array_equal(
                    F.deconvolution_2d(LARGE[:1, :, :2], TWICE), 2 * LARGE[:1, :, :2]
                )

    assert time.monotonic() - began_s < PATIENCE_S
