"""SIGTERM during a striped call: the call ends well, the server in time, and later calls go to the next server."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.events import Answer, FrameKind
from deconvd_server.exit_codes import ExitCode
from tests.direct_calls import get_server_info
from tests.fault_proxy import Direction, Fault
from tests.processes import wait_until
from tests.servers import ServerProcess, free_port, server_process
from tests.stripe_proxy import CONTROL, Disturbance, Spot
from tests.striped_calls import LARGE, TWICE, StripedCall, striped_call
from tests.striped_clients import connect_by_proxy, force_stripes

DRAIN_S = 10.0
"""More than calls under way take; and so a server that has not ended by then has lost one."""

UP, DOWN = Direction.UP, Direction.DOWN


def send_signal(server: ServerProcess) -> None:
    """Have a server drain."""
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "draining" in server.log.read_text())


def send_most_pieces(call: StripedCall) -> None:
    """Send more than the system keeps for a server that reads nothing: so the server has begun the call."""
    call.send_call()
    call.join()
    call.send_pieces(range(call.operands.pieces_count - 1))


def send_last_piece(call: StripedCall) -> None:
    call.send_pieces([call.operands.pieces_count - 1])
    call.end_pieces()


def receive_a_piece(call: StripedCall) -> None:
    assert call.receive_piece(call.stripes[0]) is not None


STEPS: dict[str, Callable[[StripedCall], object]] = {
    "most of the operands": send_most_pieces,
    "all operands": send_last_piece,
    "a piece of the results": receive_a_piece,
}
"""The steps of a call, by what has gone through after each."""


@pytest.mark.parametrize("last", STEPS)
def test_a_striped_call_that_has_begun_is_not_lost_on_a_signal(tmp_path: Path, last: str) -> None:
    with server_process(
        tmp_path, "--drain-timeout-s", str(DRAIN_S), listen=("127.0.0.1:0",)
    ) as server:
        with striped_call(get_server_info(server).direct_port) as call:
            for name, step in STEPS.items():
                step(call)
                if name == last:
                    send_signal(server)
            y = call.receive_results()
            answer = call.receive_answer()
        exit_code = server.process.wait(DRAIN_S)

    assert isinstance(answer, Answer)
    np.testing.assert_array_equal(y, 2 * LARGE)
    assert exit_code == ExitCode.DRAINED


PHASES = {
    "before the stripes": Spot(UP, FrameKind.STRIPE),
    "before the call": Spot(UP, FrameKind.STRIPED_CALL, stripe=CONTROL),
    "among the operands": Spot(UP, FrameKind.PIECE, 3),
    "before the end of the operands": Spot(UP, FrameKind.END),
    "among the results": Spot(DOWN, FrameKind.PIECE, 2),
    "before the answer": Spot(DOWN, FrameKind.ANSWER, stripe=CONTROL),
}


@contextmanager
def server_at(directory: Path, port: int, direct_port: int) -> Iterator[ServerProcess]:
    directory.mkdir()
    options = "--drain-timeout-s", str(DRAIN_S), "--direct-port", str(direct_port)
    with server_process(directory, *options, listen=(f"127.0.0.1:{port}",)) as server:
        yield server


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_a_striped_call_loses_neither_it_nor_those_that_come_later(
    tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_stripes(monkeypatch, 2)
    ports = free_port(), free_port()
    with (
        server_at(tmp_path / "first", *ports) as first,
        connect_by_proxy(first) as (proxy, F),
        ThreadPoolExecutor(1) as caller,
    ):
        while not proxy.stripes_counts:  # the first calls may not wait for lines
            F.deconvolution_2d(LARGE, TWICE)
        proxy.disturbances.append(Disturbance(PHASES[phase], fault=Fault.HANG))
        under_way = caller.submit(F.deconvolution_2d, LARGE, TWICE)
        wait_until(lambda: proxy.faults_count == 1)
        send_signal(first)
        with server_at(tmp_path / "second", *ports) as second:
            with deconvd_client.connect(first.target, transport="tcp") as later:
                np.testing.assert_array_equal(later.deconvolution_2d(LARGE, TWICE), 2 * LARGE)
            proxy.release()
            y = under_way.result(DRAIN_S)
            exit_codes = first.process.wait(DRAIN_S), second.end()

    np.testing.assert_array_equal(y, 2 * LARGE)
    assert exit_codes == (ExitCode.DRAINED, ExitCode.DRAINED)
