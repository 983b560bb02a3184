"""Striped calls whose lines are cut, held up and reordered among each other: results are right, and nothing is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.events import FrameKind
from deconvd.model.dtypes import Array
from deconvd_client import Connection, DeadlineError, UnavailableError
from tests.fault_proxy import Direction, Fault
from tests.processes import memory_bytes, process_resources, wait_until
from tests.servers import ServerProcess, server_process
from tests.stripe_proxy import CONTROL, Disturbance, Spot, StripeProxy
from tests.striped_clients import (
    SMALL_PIECES,
    TWICE,
    connect_by_proxy,
    force_stripes,
    shrink_pieces,
)

UP, DOWN = Direction.UP, Direction.DOWN

RETRY_S = 10.0
"""More than a call takes that is made twice, on a busy machine. Either end waits longer for one that stalls."""

STREAMS_COUNT = 32
"""As many as the server lets run and wait."""

STRIPES_COUNT = (
    3  # with two, pieces travel in runs, and these calls have too few for places between them
)

_random = np.random.default_rng(0)

SHAPE = 9, 2, 128, 128
"""Five pieces there, and as many back."""

LARGE_SHAPE = 64, *SHAPE[1:]
"""More than the system keeps for an end that reads nothing: so a stripe that is held up has few of the pieces."""

CALL = Spot(UP, FrameKind.STRIPED_CALL, stripe=CONTROL)
ANSWER = Spot(DOWN, FrameKind.ANSWER, stripe=CONTROL)

PLACES = {
    "in the call": (CALL, 0.5),
    "in a stripe's first frame": (Spot(UP, FrameKind.STRIPE, 1), 0.5),
    "in the head of a piece": (Spot(UP, FrameKind.PIECE, 2), 0.5),
    "in a piece": (Spot(UP, FrameKind.ELEMENTS, 2), 0.5),
    "between pieces": (Spot(UP, FrameKind.ELEMENTS, 2), 1.0),
    "before a stripe's end": (Spot(UP, FrameKind.END, 1), 0.0),
    "in the head of a piece of a result": (Spot(DOWN, FrameKind.PIECE, 2), 0.5),
    "in a piece of a result": (Spot(DOWN, FrameKind.ELEMENTS, 2), 0.5),
    "between pieces of a result": (Spot(DOWN, FrameKind.ELEMENTS, 2), 1.0),
    "before the end of a stripe's results": (Spot(DOWN, FrameKind.END, 1), 0.0),
    "before the answer": (ANSWER, 0.0),
    "in the answer": (ANSWER, 0.5),
}

ENDED_UP, ENDED_DOWN = Spot(UP, FrameKind.END), Spot(DOWN, FrameKind.END)
"""The end of a stripe that is not held up."""

DELAYS = {
    "the call comes after its stripes": (
        Disturbance(CALL, fault=Fault.HANG, until=Spot(UP, FrameKind.STRIPE, STRIPES_COUNT - 1))
    ),
    "a stripe comes after the call": (
        Disturbance(Spot(UP, FrameKind.STRIPE), fault=Fault.HANG, until=CALL)
    ),
    "a stripe comes after another has ended": (
        Disturbance(Spot(UP, FrameKind.STRIPE), fault=Fault.HANG, until=ENDED_UP)
    ),
    "the first piece comes last": (
        Disturbance(Spot(UP, FrameKind.PIECE), fault=Fault.HANG, until=ENDED_UP)
    ),
    "a piece comes in two parts": (
        Disturbance(Spot(UP, FrameKind.ELEMENTS), 0.5, Fault.HANG, until=ENDED_UP)
    ),
    "a stripe ends late": (
        Disturbance(ENDED_UP, fault=Fault.HANG, until=Spot(UP, FrameKind.END, 1))
    ),
    "the first piece of a result comes last": (
        Disturbance(Spot(DOWN, FrameKind.PIECE), fault=Fault.HANG, until=ENDED_DOWN)
    ),
    "a piece of a result comes in two parts": (
        Disturbance(Spot(DOWN, FrameKind.ELEMENTS), 0.5, Fault.HANG, until=ENDED_DOWN)
    ),
    "the answer comes first": (
        Disturbance(Spot(DOWN, FrameKind.PIECE), fault=Fault.HANG, until=ANSWER)
    ),
    "the answer comes last": (
        Disturbance(ANSWER, fault=Fault.HANG, until=Spot(DOWN, FrameKind.END, STRIPES_COUNT - 1))
    ),
}


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory, listen = tmp_path_factory.mktemp("server"), ("127.0.0.1:0",)
    constants = {
        **SMALL_PIECES,
        "deconvd_server.transports.direct.striped_transfer:STRIPE_WAIT_S": 3.0,
    }
    with server_process(directory, listen=listen, constants=constants) as server:
        yield server
        assert "unforeseen" not in server.log.read_text()


@pytest.fixture(autouse=True)
def striped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls striped, soon after one that failed, too."""
    force_stripes(monkeypatch, STRIPES_COUNT)
    shrink_pieces(monkeypatch)
    monkeypatch.setattr("deconvd_client.transports.direct.striped_transport._FIRST_PAUSE_S", 0.0)


def make_images(shape: tuple[int, ...] = SHAPE) -> Array:
    """Return other numbers than those of earlier calls, which may still be in the memory that a server allocates."""
    return _random.integers(-3, 4, shape).astype(np.float32)


def assert_right(F: Connection, shape: tuple[int, ...] = SHAPE) -> None:
    x = make_images(shape)
    np.testing.assert_array_equal(F.deconvolution_2d(x, TWICE), 2 * x)


def assert_gradients_right(F: Connection, shape: tuple[int, ...] = SHAPE) -> None:
    """See that gradients are right, of which some are sums over all samples."""
    x, gy = make_images(shape), make_images(shape)
    gx, gW, gb = F.deconvolution_2d_grad(x, TWICE, np.zeros(2, np.float32), gy)
    flat_x, flat_gy = (a.astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1) for a in (x, gy))
    np.testing.assert_array_equal(gx, 2 * gy)
    np.testing.assert_array_equal(gW, (flat_x @ flat_gy.T)[:, :, None, None])
    np.testing.assert_array_equal(gb, flat_gy.sum(axis=1))


def wait_until_striped(F: Connection, proxy: StripeProxy) -> None:
    """Call until a call is striped: calls do not wait for lines."""

    def has_stripes() -> bool:
        before = len(proxy.stripes_counts)
        with suppress(DeadlineError):  # a hasty client's, on a busy machine
            assert_right(F)
        return proxy.stripes_counts[before:] == [STRIPES_COUNT]

    wait_until(has_stripes)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.CLOSE], ids=lambda fault: fault.value)
@pytest.mark.parametrize("place", PLACES)
def test_a_striped_call_that_is_cut_is_made_again(
    tcp_server: ServerProcess, place: str, fault: Fault
) -> None:
    spot, part = PLACES[place]
    with connect_by_proxy(tcp_server) as (proxy, F):
        wait_until_striped(F, proxy)
        proxy.disturbances.append(Disturbance(spot, part, fault))
        began_s = time.monotonic()
        assert_right(F)
        duration_s = time.monotonic() - began_s
        assert proxy.faults_count == 1
        wait_until_striped(F, proxy)

    assert duration_s < RETRY_S


@pytest.mark.parametrize("place", ["in a piece", "in a piece of a result"])
def test_striped_gradients_that_are_cut_are_made_again(
    tcp_server: ServerProcess, place: str
) -> None:
    spot, part = PLACES[place]
    with connect_by_proxy(tcp_server) as (proxy, F):
        wait_until_striped(F, proxy)
        proxy.disturbances.append(Disturbance(spot, part))
        assert_gradients_right(F)
        assert proxy.faults_count == 1
        assert_gradients_right(F)


@pytest.mark.parametrize("delay", DELAYS)
def test_stripes_that_overtake_each_other_change_nothing(
    tcp_server: ServerProcess, delay: str
) -> None:
    with connect_by_proxy(tcp_server) as (proxy, F):
        wait_until_striped(F, proxy)
        before = len(proxy.stripes_counts)
        proxy.disturbances.append(DELAYS[delay])
        assert_right(F, LARGE_SHAPE)
        proxy.disturbances.append(DELAYS[delay])
        assert_gradients_right(F, LARGE_SHAPE)

        assert proxy.faults_count == 2
        assert proxy.stripes_counts[before:] == [STRIPES_COUNT] * 2  # at once, and not again


@pytest.mark.parametrize("place", ["in a piece", "in a piece of a result"])
def test_a_stripe_that_hangs_ends_a_call_at_its_deadline(
    tcp_server: ServerProcess, place: str
) -> None:
    spot, part = PLACES[place]
    with connect_by_proxy(tcp_server, timeout_s=2.0) as (proxy, F):
        wait_until_striped(F, proxy)
        proxy.disturbances.append(Disturbance(spot, part, Fault.HANG))
        with pytest.raises(DeadlineError):
            F.deconvolution_2d(make_images(), TWICE)
        assert proxy.faults_count == 1
        assert_right(F, (1, 2, 8, 8))


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_striped_calls_that_are_cut_leave_nothing_on_the_server(
    tcp_server: ServerProcess, fault: Fault
) -> None:
    pid = tcp_server.process.pid
    with deconvd_client.connect(tcp_server.target, transport="tcp") as F:
        assert_right(F)
    before = process_resources(pid)

    timeout_s = 0.5 if fault is Fault.HANG else 60
    with connect_by_proxy(tcp_server, timeout_s=timeout_s) as (proxy, F):
        proxy.disturbances += [
            Disturbance(spot, part, fault) for spot, part in PLACES.values() for _ in range(3)
        ]
        faults_count = len(proxy.disturbances)
        assert faults_count > STREAMS_COUNT
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: call_until_all_failed(proxy, F), range(4)))

    wait_until(lambda: process_resources(pid).descriptors_count <= before.descriptors_count)
    # workers that gRPC's calls have started stay
    wait_until(
        lambda: process_resources(pid).threads_count <= before.threads_count + STREAMS_COUNT // 2
    )
    limit_bytes = (
        before.memory_bytes + faults_count * make_images().nbytes
    )  # half of what all these calls held
    wait_until(lambda: memory_bytes(pid) < limit_bytes)
    with deconvd_client.connect(tcp_server.target, transport="grpc") as F:
        (device,) = F.server_info().devices
        assert (device.running_calls_count, device.waiting_calls_count) == (0, 0)
        assert device.used_bytes == 0
        assert_right(F)


def call_until_all_failed(proxy: StripeProxy, F: Connection) -> None:
    while proxy.disturbances:
        with suppress(UnavailableError, DeadlineError):
            F.deconvolution_2d(make_images(), TWICE)
