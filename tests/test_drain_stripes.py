"""SIGTERM during a striped call: the call ends well, the server in time, and later calls go to the next server."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.events import FrameKind
from deconvd.direct.pieces import PieceSpace
from deconvd.model.operation import DECONVOLVE
from deconvd_server.exit_codes import ExitCode
from tests.direct_calls import get_server_info
from tests.fault_proxy import Direction, Fault
from tests.processes import wait_until
from tests.servers import ServerProcess, free_port, server_process
from tests.stripe_proxy import CONTROL, Disturbance, Spot
from tests.striped_calls import StripedClient, describe
from tests.striped_clients import LARGE, TWICE, connect_by_proxy, force_stripes

DRAIN_S = 30.0
"""More than calls under way take; and so a server that has not ended by then has lost one."""

OPERANDS = {"w": TWICE, "x": LARGE}
LAST_PIECE = PieceSpace([*OPERANDS.values()]).pieces_count - 1

UP, DOWN = Direction.UP, Direction.DOWN


def send_signal(server: ServerProcess) -> None:
    """Have a server drain."""
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "draining" in server.log.read_text())


def send_call(client: StripedClient, server: ServerProcess) -> None:
    client.begin(describe(DECONVOLVE, OPERANDS))
    wait_until(lambda: "in 2 stripes" in server.log.read_text())


def send_most_pieces(client: StripedClient, server: ServerProcess) -> None:
    client.join()
    client.send([*OPERANDS.values()], range(LAST_PIECE), ends=False)


def send_last_piece(client: StripedClient, server: ServerProcess) -> None:
    client.send([*OPERANDS.values()], [LAST_PIECE])


def wait_for_results(client: StripedClient, server: ServerProcess) -> None:
    """Wait for the begin of results, of which there are more than the system keeps for a client that reads nothing."""
    wait_until(lambda: any(stripe.poll(0) for stripe in client.stripes))


STEPS: dict[str, Callable[[StripedClient, ServerProcess], None]] = {
    "the call": send_call,
    "most of the operands": send_most_pieces,
    "all operands": send_last_piece,
    "the begin of the results": wait_for_results,
}
"""The steps of a call, by what has gone through after each."""


@pytest.mark.parametrize("last", STEPS)
def test_a_striped_call_that_has_begun_is_not_lost_on_a_signal(tmp_path: Path, last: str) -> None:
    options = "--drain-timeout-s", str(DRAIN_S), "--log-level", "debug"
    with server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as server:
        with closing(StripedClient(get_server_info(server).direct_port)) as client:
            for name, step in STEPS.items():
                step(client, server)
                if name == last:
                    send_signal(server)
            y = np.empty_like(LARGE)
            client.receive([y])
            client.take_answer(DECONVOLVE)
        exit_code = server.process.wait(DRAIN_S)

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
    force_stripes(monkeypatch, 3)
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
