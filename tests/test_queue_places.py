"""Places in the queue are fair between addresses: calls that wait for answers nobody reads leave others enough."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from deconvd.model.geometry import Geometry
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1 import deconvd_pb2_grpc as pb_grpc
from deconvd.wire.messages import message_from_geometry
from deconvd.wire.tensor import message_from_array
from deconvd_client import Connection
from tests.processes import wait_until
from tests.scrapes import metrics_address, scrape
from tests.servers import ServerProcess, server_process
from tests.soak.hostile.http2 import SERVICE, Http2
from tests.soak.hostile.requests import of_one_pixel, of_samples_to_come
from tests.soak.places import connect_tcp

HOSTILE = "127.0.0.2", "127.0.0.3", "127.0.0.4"
CLIENTS_COUNT = 6
"""More than the server has threads, so that several of them wait at once."""

ROUNDS_COUNT = 3
BURST_COUNT = 8
TIMEOUT_S = 60


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    options = "--device-memory-bytes", "64Mi", "--threads", "2", "--metrics-port", "0"
    with server_process(tmp_path, *options, listen=("127.0.0.1:0",)) as running:
        yield running


@pytest.fixture
def F(server: ServerProcess) -> Iterator[Connection]:
    with closing(deconvd_client.connect(server.target, timeout_s=TIMEOUT_S)) as connection:
        yield connection


def attack(server: ServerProcess, source: str) -> Http2:
    """Return a connection from an address that reads no answer."""
    port = int(server.target.rpartition(":")[2])
    return Http2(connect_tcp(port, source), answer_bytes=0)


def refused_count(metrics: str) -> float:
    """Return how many calls were refused for want of places."""
    return scrape(metrics).value("deconvd_refused_calls_total", reason="places")


def waiting_count(F: Connection) -> int:
    return F.server_info().devices[0].waiting_calls_count


def test_clients_of_one_address_are_served_beside_addresses_that_read_no_answers(
    server: ServerProcess, F: Connection
) -> None:
    """They have no retries, so one that is refused would fail."""
    unread = of_one_pixel(side=480)  # with 0.9 MB, of which a few fill its peer's part
    unread.waits = True
    kernel = np.ones((1, 1, 64, 64), np.float32)  # some 0.1 s
    request = pb.DeconvolveRequest(
        x=message_from_array(kernel),
        w=message_from_array(kernel),
        geometry=message_from_geometry(Geometry(pad=(32, 32))),
        waits=True,
    )
    metrics = metrics_address(server)
    with ExitStack() as stack:
        for source in HOSTILE:
            connection = stack.enter_context(attack(server, source))
            count = refused_count(metrics)
            while refused_count(metrics) == count:
                for _ in range(BURST_COUNT):
                    connection.call(f"{SERVICE}Deconvolve", unread.SerializeToString())
        held_count = waiting_count(F)

        alone = [("grpc.use_local_subchannel_pool", 1)]  # a connection each
        stubs = [
            pb_grpc.DeconvolutionServiceStub(
                stack.enter_context(grpc.insecure_channel(server.target, alone))
            )
            for _ in range(CLIENTS_COUNT)
        ]
        callers = stack.enter_context(ThreadPoolExecutor(CLIENTS_COUNT))
        for _ in range(ROUNDS_COUNT):
            calls = [callers.submit(stub.Deconvolve, request, timeout=TIMEOUT_S) for stub in stubs]
            for call in calls:
                assert call.result().y.shape == [1, 1, 63, 63]

        assert held_count >= 72
        assert waiting_count(F) >= held_count


def test_streams_in_which_nothing_follows_take_no_place_in_the_queue(
    server: ServerProcess, F: Connection
) -> None:
    def streams_count() -> int:
        counts = F.server_info().counts
        assert counts is not None
        return counts.running_streams_count + counts.waiting_streams_count

    with ExitStack() as stack:
        for source in HOSTILE:
            connection = stack.enter_context(attack(server, source))
            for _ in range(BURST_COUNT):
                message = of_samples_to_come(64)
                connection.call(f"{SERVICE}DeconvolveStream", message, is_last=False)
        wait_until(lambda: streams_count() >= BURST_COUNT)

        assert waiting_count(F) == 0
