"""What is tried again, how long and how often: a busy server is not a lost one, and a restarted one is found again."""

from __future__ import annotations

import gc
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from click.testing import CliRunner

import deconvd_client
from deconvd.errors import (
    DeadlineError,
    DeconvdError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from deconvd.model.problem import spec_of
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.tensor import message_from_spec
from deconvd_client import cli
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.transport import TlsFailureError
from deconvd_client.transports import retry_policy, route
from deconvd_client.transports.retry_policy import PinnedTransportError, RetryPolicy
from tests.lenders import is_in_shared_memory
from tests.processes import wait_until
from tests.servers import ServerProcess, call_until_served, free_port, server_process

X = np.ones((1, 2, 3, 3), np.float32)
W = np.ones((2, 2, 2, 2), np.float32)
LARGE = np.ones((4, 2, 64, 64), np.float32)
SLACK_S = 10.0

Serve = Callable[..., AbstractContextManager[ServerProcess]]

AWAY = UnavailableError("nobody listens")
FULL = UnavailableError("the server is full", retry_after_s=0.3)


class Attempts:
    """Attempts that fail with one error after the other, and then succeed."""

    def __init__(self, *errors: DeconvdError) -> None:
        self._errors = iter(errors)
        self.times_s: list[float] = []

    def __call__(self) -> str:
        self.times_s.append(time.monotonic())
        error = next(self._errors, None)
        if error is not None:
            raise error
        return "done"


def forever(error: DeconvdError) -> Attempts:
    return Attempts(*[error] * 10_000)


def reached() -> RetryPolicy:
    """Return the retries of a connection whose server has answered."""
    retries = RetryPolicy()
    retries.run(Attempts(), Deadline(1))
    return retries


class TestRetries:
    """The policy alone. `test_retry_times` has its times, by a clock of its own."""

    def test_a_server_that_says_when_to_come_back_is_not_tried_sooner(self) -> None:
        attempts = Attempts(FULL, FULL)
        assert RetryPolicy().run(attempts, Deadline(30)) == "done"

        assert min(np.diff(attempts.times_s)) >= 0.3

    def test_what_it_says_goes_beyond_the_deadline_is_raised_at_once(self) -> None:
        attempts = forever(UnavailableError("full", retry_after_s=100))
        with pytest.raises(UnavailableError, match="full"):
            RetryPolicy().run(attempts, Deadline(10))

        assert len(attempts.times_s) == 1

    @pytest.mark.parametrize(
        "error",
        [
            *(InvalidArgumentError("x"), PinnedTransportError("no such way")),
            *(UnauthenticatedError("no token"), TlsFailureError("no such authority")),
        ],
    )
    def test_what_cannot_help_is_not_tried_again(self, error: DeconvdError) -> None:
        attempts = forever(error)
        with pytest.raises(type(error)):
            reached().run(attempts, Deadline(30))

        assert len(attempts.times_s) == 1

    def test_fail_fast_raises_at_once_where_the_server_is_away_but_not_where_it_is_full(
        self,
    ) -> None:
        retries = RetryPolicy(fail_fast=True)
        assert retries.run(Attempts(FULL), Deadline(30)) == "done"
        attempts = forever(AWAY)
        with pytest.raises(UnavailableError):
            retries.run(attempts, Deadline(30))

        assert len(attempts.times_s) == 1

    def test_a_closed_connection_tries_nothing_again(self) -> None:
        retries = reached()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(retries.run, forever(AWAY), Deadline(60))
            retries.stop()
            with pytest.raises(UnavailableError):
                running.result(timeout=SLACK_S)

    def test_a_try_that_the_deadline_cuts_short_does_not_hide_why_there_were_others(self) -> None:
        attempts = Attempts(AWAY, DeadlineError("Deadline Exceeded"))
        with pytest.raises(UnavailableError, match="nobody listens"):
            reached().run(attempts, Deadline(30))

        assert len(attempts.times_s) == 2

    def test_a_deadline_names_its_limit(self) -> None:
        with pytest.raises(DeadlineError, match=r"the 7\.5 s that timeout_s of connect\(\) allows"):
            RetryPolicy().run(forever(DeadlineError("Deadline Exceeded")), Deadline(7.5))


@pytest.fixture
def addresses(socket_directory: Path) -> tuple[str, str]:
    """A TCP address, and a Unix socket, that servers listen at one after the other."""
    return f"127.0.0.1:{free_port()}", f"unix:{socket_directory}/deconvd.sock"


@pytest.fixture
def serve(socket_directory: Path, addresses: tuple[str, str]) -> Serve:
    def serving(*options: str) -> AbstractContextManager[ServerProcess]:
        return server_process(socket_directory, "--log-level", "debug", *options, listen=addresses)

    return serving


@pytest.mark.usefixtures("unmeasured")
def test_busy_is_not_gone(
    serve: Serve, addresses: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    x = np.ones((2, 2, 1024, 1024), np.float32)  # 17 MB
    caplog.set_level(logging.WARNING)
    with serve("--shared-memory-bytes", "0") as server:
        with (
            deconvd_client.connect(addresses[0], timeout_s=100) as F,
            ThreadPoolExecutor(40) as pool,
        ):
            ys = list(pool.map(lambda _: F.deconvolution_2d(x, W)[0, 0, 1, 1], range(40)))
            before = server.log.read_text()
            F.deconvolution_2d(X, W)
            after = server.log.read_text().removeprefix(before)

    assert ys == [8.0] * 40
    assert not caplog.records
    assert "Deconvolve from unix:" in after
    assert "from ipv4:" not in after


@contextmanager
def unfinished_call(server: ServerProcess, target: str) -> Iterator[None]:
    """Have a call under way at a server, for the block, whose request has begun and does not end."""
    let_go = threading.Event()
    request = pb.DeconvolveRequest(x=message_from_spec(spec_of(X)), w=message_from_spec(spec_of(W)))
    header = pb.DeconvolveStreamHeader(request=request, slice_samples_count=1)

    def requests() -> Iterator[bytes]:
        yield pb.DeconvolveStreamRequest(header=header).SerializeToString()
        let_go.wait(60)

    with grpc.insecure_channel(target) as channel:
        path = "/deconvd.v1.DeconvolutionService/DeconvolveStream"
        stream: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
        call = stream(requests())
        wait_until(lambda: "DeconvolveStream from" in server.log.read_text())
        try:
            yield
        finally:
            let_go.set()
            call.cancel()


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("index", [0, 1], ids=["to tcp", "to unix"])
@pytest.mark.parametrize("transport", ["auto", "shared_memory"])
def test_a_server_that_drains_beside_its_successor_does_not_keep_memory_from_being_shared(
    serve: Serve, addresses: tuple[str, str], transport: str, index: int
) -> None:
    with deconvd_client.connect(addresses[index], transport=transport, timeout_s=30) as F:
        with serve() as first, unfinished_call(first, addresses[1]):
            assert is_in_shared_memory(F.deconvolution_2d(LARGE, W))
            first.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not Path(addresses[1].removeprefix("unix:")).exists())
            with serve():
                assert first.process.poll() is None
                assert F.deconvolution_2d(LARGE, W)[0, 0, 1, 1] == 8
                wait_until(lambda: is_in_shared_memory(F.deconvolution_2d(LARGE, W)))


def test_what_is_put_in_shared_memory_waits_for_a_restart(serve: Serve) -> None:
    with serve() as first:
        target = first.targets[-1]
        F = deconvd_client.connect(target, transport="shared_memory", timeout_s=30)
        kept = F.put(LARGE)
        first.end(signal.SIGKILL)
    with F, ThreadPoolExecutor(2) as pool:
        again: list[Future[object]] = [pool.submit(F.put, LARGE), pool.submit(kept.numpy)]
        time.sleep(1)  # both are tried in vain meanwhile
        with serve():
            for one in again:
                np.testing.assert_array_equal(one.result(), LARGE)


@pytest.mark.parametrize(
    ("transport", "index"),
    [
        ("auto", 0),
        ("grpc", 0),
        ("shared_memory", 1),
        *(
            pytest.param(transport, index, marks=pytest.mark.slow)
            for transport, index in (
                ("auto", 1),
                ("grpc", 1),
                ("shared_memory", 0),
                ("unix", 0),
                ("unix", 1),
            )
        ),
    ],
)
def test_a_restart_is_waited_for(
    serve: Serve, addresses: tuple[str, str], transport: str, index: int
) -> None:
    """The index is that of a TCP address, or of a Unix socket."""
    with deconvd_client.connect(addresses[index], timeout_s=60, transport=transport) as F:
        with ThreadPoolExecutor(4) as pool:
            with serve() as first:
                assert F.deconvolution_2d(LARGE, W)[0, 0, 1, 1] == 8
                kept = F.put(W)
                first.end(signal.SIGKILL)
            calls = [pool.submit(F.deconvolution_2d, x, w) for x in (X, LARGE) for w in (W, kept)]
            time.sleep(2)  # much longer than a refused connection takes to say so
            assert not any(call.done() for call in calls)
            with serve():
                for call in calls:
                    assert call.result()[0, 0, 1, 1] == 8


@pytest.mark.usefixtures("patient")
def test_the_nearer_way_comes_back_without_a_call_paying_for_it(
    serve: Serve, addresses: tuple[str, str]
) -> None:
    with deconvd_client.connect(addresses[0], timeout_s=60) as F:
        with serve() as first:
            assert is_in_shared_memory(F.deconvolution_2d(LARGE, W))
            first.end(signal.SIGKILL)
        with serve() as second:
            F.deconvolution_2d(X, W)
            wait_until(lambda: is_in_shared_memory(F.deconvolution_2d(LARGE, W)))

            def goes_near() -> bool:
                before = second.log.read_text()
                F.deconvolution_2d(X, W)
                after = second.log.read_text().removeprefix(before)
                return "Deconvolve from unix:" in after

            wait_until(goes_near)
            third_from = second.end(signal.SIGTERM)
        assert third_from == 0
        with serve():
            wait_until(lambda: is_in_shared_memory(F.deconvolution_2d(LARGE, W)))


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("index", [0, 1], ids=["to tcp", "to unix"])
def test_memory_is_shared_again_soon_after_a_server_was_away_for_long(
    serve: Serve, addresses: tuple[str, str], index: int
) -> None:
    with deconvd_client.connect(addresses[index], fail_fast=True) as F:
        with serve() as first:
            assert is_in_shared_memory(F.deconvolution_2d(LARGE, W))
            first.end(signal.SIGKILL)
        for _ in range(4):
            with pytest.raises(UnavailableError):
                F.deconvolution_2d(LARGE, W)
            time.sleep(2)  # pauses between attempts grow meanwhile
        with serve():
            begun_s = time.monotonic()
            wait_until(lambda: is_in_shared_memory(call_until_served(F, LARGE, W)))
            assert time.monotonic() - begun_s < 5


def test_nobody_looks_for_a_nearer_way_once_the_connection_is_closed_or_gone(
    serve: Serve,
    addresses: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.ERROR)  # records of the loss would hold the connection
    monkeypatch.setattr(route, "_MAX_PROBE_PAUSE_S", 0.2)
    with serve() as first:
        connections = [deconvd_client.connect(addresses[0], fail_fast=True) for _ in range(2)]
        for F in connections:
            F.deconvolution_2d(X, W)
        first.end(signal.SIGKILL)
        for F in connections:
            with pytest.raises(UnavailableError):
                F.deconvolution_2d(X, W)
    connections[0].close()
    connections.clear()
    del F
    gc.collect()
    with serve() as second:
        time.sleep(1)  # one that looked on would come by meanwhile

        assert "GetServerInfo" not in second.log.read_text()


def test_the_commands_fail_at_once_where_nobody_listens(
    addresses: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry_policy, "_FIRST_CONTACT_TIMEOUT_S", 60)  # what else they would wait
    begun_s = time.monotonic()
    done = CliRunner().invoke(cli.main, ["status", "--target", addresses[0]])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert time.monotonic() - begun_s < 30
