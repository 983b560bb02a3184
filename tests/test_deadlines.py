"""A call has one deadline, whatever the server does: it raises by then, and closing takes a second."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd_client import Connection, DeadlineError, DeconvdError
from deconvd_client.calls.deadline import Deadline
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process, stop_server

TIMEOUT_S = 2.0
SLACK_S = 8.0
"""What a busy machine may add to any bound."""

CLOSE_S = 1.0

X = np.ones((1, 2, 3, 3), np.float32)
W = np.ones((2, 2, 2, 2), np.float32)
LARGE_W = np.ones((2, 2, 128, 128), np.float32)  # worth a digest where it would be sent
LARGE = np.ones((16, 2, 256, 256), np.float32)
FRESH_BYTES = 256 << 20

TRANSPORTS = ("auto", "shared_memory", "unix", "tcp", "grpc")


@pytest.fixture
def server(socket_directory: Path) -> Iterator[ServerProcess]:
    with server_process(socket_directory, listen=("127.0.0.1:0", "unix")) as running:
        yield running


def took_s(work: Callable[[], object], expected: type[DeconvdError] | None = None) -> float:
    """Return how long something takes that may raise one error."""
    begun_s = time.monotonic()
    if expected is None:
        work()
    else:
        with pytest.raises(expected):
            work()
    return time.monotonic() - begun_s


def calls_of(F: Connection) -> list[Callable[[], object]]:
    """Return calls of every kind that wait for the server."""
    kept = F.put(LARGE)
    y, pullback = F.vjp(X, W)
    gy = np.ones((16, 2, 257, 257), np.float32)
    return [
        lambda: F.deconvolution_2d(X, W),
        lambda: F.deconvolution_2d(LARGE, W),
        lambda: F.deconvolution_2d(X, LARGE_W),
        lambda: F.deconvolution_2d_grad(LARGE, W, None, gy),
        lambda: F.deconvolution_2d(kept, W),
        lambda: F.put(LARGE),
        lambda: F.remote.deconvolution_2d(X, W),
        lambda: pullback(y),
        kept.numpy,
        F.server_info,
        F.health,
    ]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("index", [0, 1], ids=["to tcp", "to unix"])
def test_every_call_to_a_server_that_says_nothing_ends_at_its_deadline(
    server: ServerProcess, transport: str, index: int
) -> None:
    if transport == "tcp" and index == 1:
        transport = "grpc"  # TCP to a Unix socket is refused
    F = deconvd_client.connect(server.targets[index], timeout_s=TIMEOUT_S, transport=transport)
    calls = calls_of(F)
    for call in calls:
        call()
    with stop_server(server), ThreadPoolExecutor(len(calls) + 1) as pool:
        fresh = pool.submit(took_s, lambda: F.empty(FRESH_BYTES, np.float16))
        taken = list(pool.map(lambda call: took_s(call, DeconvdError), calls))

        assert max(taken) < TIMEOUT_S + SLACK_S
        assert fresh.result() < TIMEOUT_S + SLACK_S
        assert took_s(F.close) < CLOSE_S + SLACK_S


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_call_to_a_server_that_never_said_anything_ends_at_its_deadline(
    server: ServerProcess, transport: str
) -> None:
    F = deconvd_client.connect(server.target, timeout_s=TIMEOUT_S, transport=transport)
    with stop_server(server), ThreadPoolExecutor(8) as pool:
        calls = [lambda: F.deconvolution_2d(LARGE, W), lambda: F.put(X), F.health] * 2
        taken = list(pool.map(lambda call: took_s(call, DeconvdError), calls))

        assert max(taken) < TIMEOUT_S + SLACK_S
        assert took_s(F.close) < CLOSE_S + SLACK_S


def test_closing_while_calls_wait_for_a_stopped_server_takes_a_second(
    server: ServerProcess,
) -> None:
    F = deconvd_client.connect(server.target, timeout_s=60)
    calls = calls_of(F)
    with ThreadPoolExecutor(len(calls) + 1) as pool:
        with stop_server(server):
            waiting = [pool.submit(took_s, call, DeconvdError) for call in calls]
            waiting.append(pool.submit(took_s, lambda: F.empty(FRESH_BYTES, np.float16)))
            wait_until(lambda: all(call.running() for call in waiting))
            assert took_s(F.close) < CLOSE_S + SLACK_S
            for call in waiting:
                assert call.result(timeout=30) < 30


@pytest.mark.parametrize("transport", ["unix", "grpc"])
def test_calls_end_at_their_deadlines_and_at_the_close_however_long_a_server_is_stopped(
    server: ServerProcess, transport: str
) -> None:
    F = deconvd_client.connect(server.targets[1], timeout_s=TIMEOUT_S, transport=transport)
    call = partial(F.deconvolution_2d, LARGE, W)
    assert call().any()
    with ThreadPoolExecutor(6) as pool, stop_server(server):
        # what the first send stays in sockets, and later ones cannot even begin to send
        for _ in range(3):
            waiting = [pool.submit(took_s, call, DeconvdError) for _ in range(6)]
            assert max(one.result() for one in waiting) < TIMEOUT_S + SLACK_S
        waiting = [pool.submit(took_s, call, DeconvdError) for _ in range(6)]
        wait_until(lambda: all(one.running() for one in waiting))
        assert took_s(F.close) < CLOSE_S + SLACK_S
        assert max(one.result() for one in waiting) < TIMEOUT_S + SLACK_S


def test_calls_go_on_once_a_stopped_server_does(server: ServerProcess) -> None:
    with (
        deconvd_client.connect(server.targets[1], timeout_s=TIMEOUT_S, transport="grpc") as F,
        ThreadPoolExecutor(6) as pool,
    ):
        kept = F.put(LARGE)
        y = F.deconvolution_2d(LARGE, W)
        with stop_server(server):
            for _ in range(2):
                calls = [pool.submit(took_s, partial(F.put, LARGE), DeconvdError) for _ in range(6)]
                assert max(one.result() for one in calls) < TIMEOUT_S + SLACK_S
        np.testing.assert_array_equal(F.deconvolution_2d(kept, W), y)


def test_room_that_is_borrowed_already_is_had_at_once_from_a_stopped_server(
    server: ServerProcess,
) -> None:
    F = deconvd_client.connect(server.target, timeout_s=20, transport="shared_memory")
    F.deconvolution_2d(LARGE, W)
    with stop_server(server), ThreadPoolExecutor(1) as pool:
        asking = pool.submit(F.empty, FRESH_BYTES, np.float16)

        assert took_s(lambda: F.empty(256, np.float32)) < SLACK_S

        assert took_s(F.close) < CLOSE_S + SLACK_S
        asking.result(timeout=30)


def test_the_error_names_the_limit_and_the_options(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target, timeout_s=0.25) as F:
        with (
            stop_server(server),
            pytest.raises(DeadlineError, match=r"0\.25 s .*timeout_s .*--timeout-s"),
        ):
            F.deconvolution_2d(X, W)


def test_a_deadline_counts_from_when_it_was_made() -> None:
    deadline = Deadline(50)
    assert 0 < deadline.remaining_s() <= 50
    assert deadline.with_limit(100).remaining_s() <= 50
    assert Deadline(100).with_limit(50).remaining_s() <= 50
    short = Deadline(0.05)
    time.sleep(0.06)
    assert short.remaining_s() == 0
