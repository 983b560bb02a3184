"""`Connection.submit`: futures of calls, which can be cancelled while the calls run."""

from __future__ import annotations

import concurrent.futures
import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deconvd_client
from deconvd.direct.events import StripedCallHead
from deconvd_client import (
    CallCancelledError,
    Connection,
    DeadlineError,
    InvalidArgumentError,
    UnavailableError,
)
from tests.held_servers import HeldServer, held_server, load
from tests.processes import wait_until
from tests.servers import ServerProcess, free_port, only_server, stop_server
from tests.striped_clients import Heads, force_stripes, wait_until_direct, watch_heads

TIMEOUT_S = 30.0
SOON_S = 10.0
"""Far more than a cancelled call takes on a busy machine, and far less than one that waits for its deadline."""

SMALL_X = np.ones((1, 2, 4, 4), np.float32)
LARGE_X = np.ones((24, 2, 256, 256), np.float32)
"""12 MiB: more than fits into a message."""
W = np.ones((2, 1, 1, 1), np.float32)


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeldServer]:
    with held_server(tmp_path_factory.mktemp("held")) as server:
        yield server


@pytest.fixture(params=["shared_memory", "unix", "tcp", "grpc"])
def G(request: pytest.FixtureRequest, held: HeldServer) -> Iterator[Connection]:
    """A connection by each transport to a server that holds calls."""
    transport = request.param
    with deconvd_client.connect(held.target(transport), transport=transport) as G:
        G.deconvolution_2d(SMALL_X, W)
        held.hold()
        yield G
        held.release()


def submit_held(G: Connection, function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Submit a call, and return once the server runs it."""
    future: Future[Any] = G.submit(function, *args)
    wait_until(lambda: load(G)[0] == 1)
    return future


def test_a_result_is_that_of_the_function(F: Connection) -> None:
    future = F.submit(F.deconvolution_2d, SMALL_X, W, stride=2)

    np.testing.assert_array_equal(future.result(), F.deconvolution_2d(SMALL_X, W, stride=2))
    assert future.done()
    assert not future.cancel()


def test_an_error_is_that_of_the_function(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match="stride"):
        F.submit(F.deconvolution_2d, SMALL_X, W, stride=0).result()
    misspelt: Any = F.submit
    with pytest.raises(TypeError, match="did you mean 'pad' for 'padding'"):
        misspelt(F.deconvolution_2d, SMALL_X, W, padding=1).result()


def test_what_is_no_function_is_refused_at_once(F: Connection) -> None:
    with pytest.raises(InvalidArgumentError, match=r"function must be callable.* got ndarray"):
        F.submit(SMALL_X, W)  # type: ignore[arg-type]  # this is the test


def test_every_function_of_the_connection_can_be_submitted(F: Connection) -> None:
    y = F.deconvolution_2d(SMALL_X, W)
    with F.submit(F.put, SMALL_X).result() as x:
        np.testing.assert_array_equal(F.submit(x.numpy).result(), SMALL_X)
        with F.submit(F.remote.deconvolution_2d, x, W).result() as kept:
            np.testing.assert_array_equal(kept.numpy(), y)
    returned, pullback = F.submit(F.vjp, SMALL_X, W).result()
    with pullback:
        np.testing.assert_array_equal(returned, y)
        expected = F.deconvolution_2d_grad(SMALL_X, W, None, y)
        np.testing.assert_array_equal(F.submit(pullback, y).result().gW, expected.gW)


def test_the_standard_library_waits_for_these_futures(F: Connection) -> None:
    futures = [F.submit(F.deconvolution_2d, SMALL_X * n, W) for n in range(40)]

    done, not_done = concurrent.futures.wait(futures, TIMEOUT_S)

    assert not not_done
    assert len(done) == 40
    for n, future in enumerate(futures):
        np.testing.assert_array_equal(future.result(), 2 * n * np.ones((1, 1, 4, 4)))


def test_options_are_those_of_the_caller(F: Connection) -> None:
    with F.using_config("use_cudnn", "never"):
        future = F.submit(lambda: F._config.options.use_cudnn)
    assert future.result() == "never"
    assert F.submit(lambda: F._config.options.use_cudnn).result() == "auto"


def test_the_ledger_is_that_of_the_functions_own_calls(F: Connection) -> None:
    def call() -> dict[str, int]:
        F.deconvolution_2d(SMALL_X, W)
        return dict(F.last_ledger)

    assert F.submit(call).result()["server_us"] > 0
    # in a thread that has made a call before
    assert F.submit(lambda: dict(F.last_ledger)).result() == {}


@pytest.mark.parametrize("x", [SMALL_X, LARGE_X], ids=["small", "large"])
def test_cancel_ends_a_call_that_runs_and_frees_the_server(
    G: Connection, held: HeldServer, x: Any
) -> None:
    future = submit_held(G, G.deconvolution_2d, x, W)
    assert future.running()
    begin_s = time.monotonic()

    assert future.cancel()

    with pytest.raises(CancelledError):
        future.result(0)
    assert concurrent.futures.wait([future], SOON_S).done  # the thread has ended, too
    wait_until(lambda: load(G) == (0, 0, 0))
    assert time.monotonic() - begin_s < SOON_S
    held.release()
    np.testing.assert_array_equal(G.deconvolution_2d(x, W), x.sum(1, keepdims=True))


@pytest.mark.parametrize("name", ["put, get", "remote", "vjp", "gradients"])
def test_cancel_ends_every_kind_of_call(G: Connection, held: HeldServer, name: str) -> None:
    y = LARGE_X[:, :1]
    kinds: dict[str, Callable[[], object]] = {
        "put, get": lambda: G.put(LARGE_X).numpy().sum() and G.deconvolution_2d(LARGE_X, W),
        "remote": lambda: G.remote.deconvolution_2d(LARGE_X, W),
        "vjp": lambda: G.vjp(LARGE_X, W),
        "gradients": lambda: G.deconvolution_2d_grad(LARGE_X, W, None, y),
    }
    future = submit_held(G, kinds[name])

    assert future.cancel()

    assert concurrent.futures.wait([future], SOON_S).done
    wait_until(lambda: load(G)[:2] == (0, 0))
    held.release()
    np.testing.assert_array_equal(G.put(W).numpy(), W)


def test_shared_memory_of_a_cancelled_call_is_given_back(held: HeldServer) -> None:
    with deconvd_client.connect(held.unix_target, transport="shared_memory") as G:
        G.deconvolution_2d(LARGE_X, W)
        usual_bytes = only_server(G).borrower.borrowed_bytes
        for _ in range(4):
            held.hold()
            future = submit_held(G, G.deconvolution_2d, LARGE_X, W)
            future.cancel()
            concurrent.futures.wait([future])
            held.release()
            G.deconvolution_2d(LARGE_X, W)

        wait_until(lambda: only_server(G).borrower.borrowed_bytes <= 2 * usual_bytes)
        wait_until(lambda: only_server(G).borrower.allocated_bytes == 0)
    assert held.lender.wait_until_unused(TIMEOUT_S)


def test_a_result_that_is_cancelled_or_dropped_is_not_kept_on_the_server(held: HeldServer) -> None:
    with deconvd_client.connect(held.unix_target) as H:

        def kept_count() -> int:
            (device,) = H.server_info().devices
            return sum(cache.count for cache in device.caches if cache.name == "resident tensors")

        with H.put(SMALL_X):
            assert kept_count() == 1
        wait_until(lambda: kept_count() == 0)
        for _ in range(30):
            future = H.submit(H.remote.deconvolution_2d, SMALL_X, W)
            future.cancel()
            concurrent.futures.wait([future])
            concurrent.futures.wait([H.submit(H.put, SMALL_X)])  # nobody takes the result
        del future
        wait_until(lambda: kept_count() == 0)


def test_nobody_holds_arrays_of_a_future_that_is_dropped(F: Connection) -> None:
    x = np.ones_like(SMALL_X)
    future = F.submit(F.deconvolution_2d, x, W)
    failing = F.submit(F.deconvolution_2d, x, W, stride=0)
    y_alive, x_alive = weakref.ref(future.result()), weakref.ref(x)
    assert failing.exception() is not None

    gc.disable()
    try:
        del x, future, failing
        wait_until(lambda: y_alive() is None)
        wait_until(lambda: x_alive() is None)
    finally:
        gc.enable()


def test_a_call_that_waits_for_its_turn_is_cancelled_at_once(held: HeldServer) -> None:
    with deconvd_client.connect(held.unix_target, max_concurrent_calls=1) as G:
        held.hold()
        first = submit_held(G, G.deconvolution_2d, SMALL_X, W)
        second = G.submit(G.deconvolution_2d, SMALL_X, W)
        third = G.submit(G.deconvolution_2d, SMALL_X, W)

        assert second.cancel()

        assert concurrent.futures.wait([second], SOON_S).done
        assert load(G)[:2] == (1, 0)  # the third still waits, in the client
        assert not third.running()
        held.release()
        assert first.result(TIMEOUT_S).shape == third.result(TIMEOUT_S).shape


def test_no_more_calls_run_than_allowed(F: Connection, server: ServerProcess) -> None:
    running, most = 0, 0
    lock = threading.Lock()
    barrier = threading.Barrier(3)

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(TIMEOUT_S)  # all three places are taken
        with lock:
            running -= 1

    with deconvd_client.connect(server.target, max_concurrent_calls=3) as G:
        for future in [G.submit(work) for _ in range(12)]:
            future.result(TIMEOUT_S)
    assert most == 3


def test_a_call_that_waits_for_its_turn_does_not_outlast_its_deadline(held: HeldServer) -> None:
    with (
        deconvd_client.connect(held.unix_target) as other,
        deconvd_client.connect(held.unix_target, max_concurrent_calls=1, timeout_s=2.0) as G,
    ):
        may_end = threading.Event()
        busy = G.submit(may_end.wait, TIMEOUT_S)
        late = G.submit(G.deconvolution_2d, SMALL_X, W)
        with pytest.raises(DeadlineError, match=r"2 s.*max_concurrent_calls"):
            late.result(SOON_S)

        held.hold()
        begin_s = time.monotonic()
        partly_late = G.submit(G.deconvolution_2d, SMALL_X, W)
        threading.Timer(1.8, may_end.set).start()
        with pytest.raises(DeadlineError, match="2 s"):
            partly_late.result(SOON_S)
        assert time.monotonic() - begin_s < 3.7  # not 1.8 and two whole seconds

        held.release()
        assert busy.result()
        wait_until(lambda: load(other) == (0, 0, 0))


def test_close_ends_calls_that_run_and_that_wait(held: HeldServer) -> None:
    G = deconvd_client.connect(held.unix_target, max_concurrent_calls=2)
    held.hold()
    futures = [submit_held(G, G.deconvolution_2d, SMALL_X, W)]
    futures += [G.submit(G.deconvolution_2d, SMALL_X, W) for _ in range(4)]

    G.close()

    for future in futures:
        with pytest.raises(CallCancelledError, match="closed"):
            future.result(SOON_S)
    with pytest.raises(CallCancelledError, match="closed"):
        G.submit(G.deconvolution_2d, SMALL_X, W)
    held.release()


def test_cancel_ends_a_call_that_tries_again(tmp_path: Path) -> None:
    with deconvd_client.connect(f"127.0.0.1:{free_port()}") as G:
        future = G.submit(G.deconvolution_2d, SMALL_X, W)
        assert not concurrent.futures.wait([future], 0.3).done

        assert future.cancel()

        assert concurrent.futures.wait([future], 2.0).done  # it would have tried for five seconds


@pytest.mark.parametrize("transport", ["auto", "shared_memory", "grpc"])
def test_cancel_ends_a_call_whose_server_hangs(server: ServerProcess, transport: str) -> None:
    with deconvd_client.connect(server.target, transport=transport) as G, stop_server(server):
        future = G.submit(G.deconvolution_2d, LARGE_X, W)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.3)

        assert future.cancel()

        assert concurrent.futures.wait([future], SOON_S).done


def test_functions_cannot_go_on_with_calls_once_they_are_cancelled(F: Connection) -> None:
    has_begun, may_go_on = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def work() -> None:
        has_begun.set()
        may_go_on.wait(TIMEOUT_S)
        try:
            F.deconvolution_2d(SMALL_X, W)
        except CallCancelledError as error:
            errors.append(error)

    future = F.submit(work)
    assert has_begun.wait(TIMEOUT_S)
    assert future.cancel()
    may_go_on.set()
    concurrent.futures.wait([future])

    assert len(errors) == 1
    F.deconvolution_2d(SMALL_X, W)


def test_cancelling_over_and_over_never_harms_another_call(F: Connection) -> None:
    for number in range(150):
        future = F.submit(F.deconvolution_2d, SMALL_X, W)
        other = F.submit(F.deconvolution_2d, number * SMALL_X, W)
        if number % 3:
            concurrent.futures.wait([future], number % 7 * 1e-4)
        future.cancel()
        np.testing.assert_array_equal(other.result(), 2 * number * np.ones((1, 1, 4, 4)))


@pytest.mark.parametrize("count", [0, -1, True, 1.5, "2", None])
def test_a_wrong_limit_is_refused(count: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="max_concurrent_calls must be an int") as raised:
        deconvd_client.connect("unix:nowhere", max_concurrent_calls=count)
    assert raised.value.argument == "max_concurrent_calls"


EXIT = """
import sys, threading
import numpy as np
import deconvd_client

F = deconvd_client.connect(sys.argv[1], max_concurrent_calls=1)
x, W = np.ones((1, 2, 4, 4), np.float32), np.ones((2, 1, 1, 1), np.float32)
futures = [F.submit(F.deconvolution_2d, x, W) for _ in range(3)]
while not F.server_info().devices[0].running_calls_count:
    pass
print("exits", flush=True)
"""


def test_a_process_exits_while_calls_run(held: HeldServer) -> None:
    held.hold()
    try:
        exited = subprocess.run(
            [sys.executable, "-W", "error", "-c", EXIT, held.unix_target],
            check=False,
            capture_output=True,
            text=True,
            timeout=45,
        )
    finally:
        held.release()
    assert (exited.returncode, exited.stdout, exited.stderr) == (0, "exits\n", "")


def test_no_server_is_an_error_of_the_future() -> None:
    with (
        deconvd_client.connect("unix:/nowhere", fail_fast=True) as G,
        pytest.raises(UnavailableError),
    ):
        G.submit(G.health).result(SOON_S)


@pytest.fixture
def striped(
    held: HeldServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Connection, Heads]]:
    """A connection to the held server whose large calls have three stripes, and the heads of its calls."""
    force_stripes(monkeypatch, 3)
    with deconvd_client.connect(held.tcp_target, transport="tcp") as G:
        heads = watch_heads(monkeypatch)
        wait_until_direct(G, heads)
        G.deconvolution_2d(LARGE_X, W)
        assert {type(head) for head in heads} == {StripedCallHead}
        heads.clear()
        held.hold()
        yield G, heads
        held.release()


def test_cancel_ends_a_striped_call_and_frees_the_server(
    striped: tuple[Connection, Heads], held: HeldServer
) -> None:
    G, heads = striped
    future = submit_held(G, G.deconvolution_2d, LARGE_X, W)
    assert isinstance(heads[0], StripedCallHead)

    assert future.cancel()

    assert concurrent.futures.wait([future], SOON_S).done
    with pytest.raises(CancelledError):
        future.result()
    wait_until(lambda: load(G) == (0, 0, 0))
    held.release()
    np.testing.assert_array_equal(G.deconvolution_2d(LARGE_X, W), LARGE_X.sum(1, keepdims=True))


def test_striped_calls_that_are_cancelled_at_any_time_harm_no_other(
    striped: tuple[Connection, Heads], held: HeldServer
) -> None:
    G, heads = striped
    held.release()
    expected = LARGE_X.sum(1, keepdims=True)
    for number in range(8):
        futures = [G.submit(G.deconvolution_2d, LARGE_X, W) for _ in range(3)]
        concurrent.futures.wait(futures[:1], number * 4e-3)  # a different moment of the first call
        for future in futures[:2]:
            future.cancel()
        np.testing.assert_array_equal(futures[2].result(TIMEOUT_S), expected)
        concurrent.futures.wait(futures, SOON_S)
    assert any(isinstance(head, StripedCallHead) for head in heads)
    wait_until(lambda: load(G) == (0, 0, 0))


def test_many_calls_at_once_take_no_more_threads_than_a_few(server: ServerProcess) -> None:
    code = """
import os, sys, time, deconvd_client
F = deconvd_client.connect(sys.argv[1], max_concurrent_calls=2)
before = len(os.listdir("/proc/self/task"))
futures = [F.submit(time.sleep, 0.001) for _ in range(1000)]
threads_count = len(os.listdir("/proc/self/task")) - before
for future in futures:
    future.result()
print(threads_count)
"""
    command = [sys.executable, "-c", code, server.target]

    counted = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)

    # two for the calls, one that watches the others, and some that begin while others end
    assert int(counted.stdout) < 20
