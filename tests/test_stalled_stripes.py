"""Clients that stall in the middle of a striped call: they hold nobody, and what they hold is given back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from itertools import cycle

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.connection_errors import ConnectionBrokenError
from deconvd.direct.events import EndOfStream
from deconvd.direct.frame_stream import FrameStream
from deconvd.direct.pieces import PIECE_BYTES
from deconvd.errors import UnavailableError
from deconvd.model.operation import DECONVOLVE
from tests.direct_calls import get_server_info, is_serving
from tests.processes import ProcessResources, memory_bytes, process_resources, wait_until
from tests.servers import ServerProcess, server_process
from tests.stream_pairs import send_raw
from tests.striped_calls import StripedClient, describe, is_closed
from tests.striped_clients import LARGE, TWICE

OPERANDS = {"w": TWICE, "x": LARGE}
ARRAYS = [*OPERANDS.values()]

STALL_S = 1.0

PATIENCE_S = 15.0
"""More than others take for their calls, on a busy machine; half of what a server waits for one that stalls."""

SMALL = LARGE[:1, :, :2]

STALLED_HOSTS = ["127.0.0.2"] * 14 + ["127.0.0.3", "127.0.0.4"]
"""Whence as many calls come as run at once: the last two places are for peers that have none."""


Stall = Callable[[StripedClient], list[FrameStream]]
"""Begins a call, and stops somewhere. Returns the stripes that have joined it."""


def begin(client: StripedClient) -> None:
    client.begin(describe(DECONVOLVE, OPERANDS))
    client.join()


def send_no_stripe(client: StripedClient) -> list[FrameStream]:
    client.begin(describe(DECONVOLVE, OPERANDS))
    return []


def lack_a_stripe(client: StripedClient) -> list[FrameStream]:
    client.begin(describe(DECONVOLVE, OPERANDS))
    client.stripes.pop().close()
    client.join()
    client.send(ARRAYS)
    return client.stripes


def stop_in_a_piece(client: StripedClient) -> list[FrameStream]:
    begin(client)
    send_raw(client.stripes[0], client.stripes[0].protocol.begin_piece(1, PIECE_BYTES))
    send_raw(client.stripes[0], bytes(PIECE_BYTES // 2))
    return client.stripes


def stop_in_a_head(client: StripedClient) -> list[FrameStream]:
    begin(client)
    client.send(ARRAYS, [0], ends=False)
    send_raw(client.stripes[1], client.stripes[1].protocol.begin_piece(1, PIECE_BYTES)[:5])
    return client.stripes


def stop_between_pieces(client: StripedClient) -> list[FrameStream]:
    begin(client)
    client.send(ARRAYS, [0, 1], ends=False)
    return client.stripes


def lack_an_end(client: StripedClient) -> list[FrameStream]:
    begin(client)
    client.send(ARRAYS, ends=False)
    client.stripes[0].send(EndOfStream())
    return client.stripes


def read_no_results(client: StripedClient) -> list[FrameStream]:
    begin(client)
    client.send(ARRAYS)
    return client.stripes


STALLS: list[Stall] = [
    send_no_stripe,
    lack_a_stripe,
    stop_in_a_piece,
    stop_in_a_head,
    stop_between_pieces,
    lack_an_end,
    read_no_results,
]

ANSWERED: list[Stall] = [lack_a_stripe, lack_an_end, read_no_results]
"""Those in which all operands are there: the call is answered, and then its results do not leave."""


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that waits for clients for a second where others wait for half a minute."""
    constants = {
        "deconvd_server.call.context:STALL_LIMIT_S": STALL_S,
        "deconvd_server.transports.direct.striped_transfer:STRIPE_WAIT_S": 3
        * STALL_S,  # a call computes meanwhile
        # pools alone keep large freed blocks then, the same ones for each call, and what calls hold can be seen
        "deconvd.host.malloc:LARGE_BYTES": 1 << 20,
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


def assert_is_served(port: int) -> None:
    """Make a striped call, and see that it ends well and soon."""
    with closing(StripedClient(port)) as client:
        for line in (client.control, *client.stripes):
            line.set_deadline(PATIENCE_S)
        np.testing.assert_array_equal(client.compute(DECONVOLVE, OPERANDS)["y"], 2 * LARGE)


def failures_count(server: ServerProcess) -> int:
    """Return how many calls were ended for want of progress, or of a stripe."""
    return server.log.read_text().count("UNAVAILABLE")


def assert_gone(pid: int, before: ProcessResources) -> None:
    """See that the server holds no more than before."""
    wait_until(lambda: process_resources(pid).threads_count <= before.threads_count)
    wait_until(lambda: process_resources(pid).descriptors_count <= before.descriptors_count)


@pytest.mark.parametrize("stall", STALLS)
def test_a_client_that_stalls_is_ended_and_its_memory_given_back(
    hasty: ServerProcess, stall: Stall
) -> None:
    port, pid = get_server_info(hasty).direct_port, hasty.process.pid
    assert_is_served(port)
    before, failures_before = process_resources(pid), failures_count(hasty)

    with closing(StripedClient(port)) as client:
        stripes = stall(client)
        for line in (client.control, *stripes):
            line.set_deadline(PATIENCE_S)
        if stall in ANSWERED:
            client.take_answer(DECONVOLVE)
        else:
            assert isinstance(client.take_failure(), UnavailableError)
        wait_until(lambda: failures_count(hasty) > failures_before)
        assert all(map(is_closed, stripes))
        wait_until(lambda: memory_bytes(pid) < before.memory_bytes + LARGE.nbytes // 2)
        assert is_serving(client.control)

    assert_gone(pid, before)
    assert_is_served(port)


def test_stripes_whose_call_does_not_come_are_ended(hasty: ServerProcess) -> None:
    port, pid = get_server_info(hasty).direct_port, hasty.process.pid
    assert_is_served(port)
    before = process_resources(pid)

    with closing(StripedClient(port)) as client:
        client.join()
        assert all(map(is_closed, client.stripes))

    assert_gone(pid, before)
    assert_is_served(port)


def test_clients_that_stall_keep_nobody_waiting(patient: ServerProcess) -> None:
    port = get_server_info(patient).direct_port
    with ExitStack() as stack:
        for host, stall in zip(STALLED_HOSTS, cycle(STALLS), strict=False):
            client = stack.enter_context(closing(StripedClient(port, host=host)))
            for line in client.stripes:
                line.set_deadline(0.5)
            with suppress(ConnectionBrokenError):  # it must wait for memory, or for its turn
                stall(client)
        began_s = time.monotonic()
        assert_is_served(port)
        for transport in ("tcp", "grpc"):
            target = patient.targets[1]
            with deconvd_client.connect(target, transport=transport, timeout_s=PATIENCE_S) as F:
                for x in (LARGE, SMALL):
                    np.testing.assert_array_equal(F.deconvolution_2d(x, TWICE), 2 * x)

    assert time.monotonic() - began_s < PATIENCE_S
