"""A server that has too much to do: whom it refuses, what it tells them, and whom it still serves in time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest

import deconvd_client
from benchmarks.open_loop import CallTimes, call_at_rate, find_request, open_callers
from deconvd.errors import UnavailableError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_status import error_from_rpc
from deconvd.wire.tensor import array_from_message
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process
from tests.token_calls import write_tokens

pytestmark = pytest.mark.usefixtures("unmeasured")

LEAST_S = 0.025
"""How long a call computes at least."""

HONEST, FLOOD = "h" * 32, "f" * 32
SLACK = 2.0
"""Tests run beside others, which take the processors now and then. What is promised is 3."""


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with two tenants."""
    directory = tmp_path_factory.mktemp("guarded")
    tokens = write_tokens(directory / "tokens", {HONEST: "honest", FLOOD: "flood"})
    with server_process(directory, "--tokens", str(tokens), listen=("127.0.0.1:0",)) as server:
        yield server


@pytest.fixture(scope="module")
def long_request(guarded: ServerProcess) -> pb.DeconvolveRequest:
    """What all call with."""
    request, _ = find_request(guarded.target, LEAST_S, HONEST)
    return request


@pytest.fixture
def load(
    guarded: ServerProcess, long_request: pb.DeconvolveRequest
) -> tuple[pb.DeconvolveRequest, float]:
    """What all call with, and how long it takes alone now: what else the machine does may change from test to test."""
    with open_callers(guarded.target, long_request, [HONEST]) as (caller,):
        return long_request, min(caller.call() for _ in range(7))


@pytest.fixture
def patient_server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A server whose calls may wait for long."""
    with server_process(tmp_path, "--queue-wait-s", "1000") as server:
        yield server


def refused_count(F: deconvd_client.Connection) -> int:
    counts = F.server_info().counts
    assert counts is not None
    return sum(method.ended.get("UNAVAILABLE", 0) for method in counts.methods)


@pytest.mark.slow
def test_what_is_more_than_it_can_do_is_refused_at_once_and_the_rest_is_served_in_time(
    guarded: ServerProcess, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    request, alone_s = load
    with open_callers(guarded.target, request, [HONEST] * 4) as callers:
        unloaded = CallTimes(accepted_s=[callers[0].call() for _ in range(25)])
        times = call_at_rate(callers, 4 / alone_s, 2.0, seed=1)

    assert len(times.refused_s) > 10
    assert len(times.accepted_s) > 10
    assert times.percentile_ms(50) <= 3 * SLACK * unloaded.percentile_ms(50)
    assert np.median(times.refused_s) < np.median(times.accepted_s)


@pytest.mark.slow
def test_refused_callers_are_told_to_come_back_when_it_has_done_what_it_refused(
    guarded: ServerProcess, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    request, alone_s = load
    with open_callers(guarded.target, request, [HONEST] * 4) as callers:
        few = call_at_rate(callers, 3 / alone_s, 2.0, seed=2)
        many = call_at_rate(callers, 9 / alone_s, 2.0, seed=2)

    assert min(few.retry_after_s) >= 0.01
    assert max(many.retry_after_s) <= 30
    assert np.median(many.retry_after_s) > 1.5 * np.median(few.retry_after_s)


@pytest.mark.slow
def test_refusals_are_a_line_a_second_with_their_number(
    guarded: ServerProcess, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    request, alone_s = load
    before = guarded.log.read_text().count("\n")
    with open_callers(guarded.target, request, [HONEST] * 4) as callers:
        times = call_at_rate(callers, 6 / alone_s, 2.0, seed=3)

    def told_count() -> int:
        lines = guarded.log.read_text().splitlines()[before:]
        told = [line for line in lines if "the call would wait for" in line]
        more = [int(count) for line in told for count in re.findall(r"and (\d+) more", line)]
        return len(told) + sum(more)

    wait_until(lambda: told_count() >= len(times.refused_s))
    lines_count = guarded.log.read_text().count("\n") - before
    assert len(times.refused_s) > 2 * lines_count


@pytest.mark.slow
def test_a_flood_of_one_tenant_leaves_another_its_speed_and_has_none_of_its_calls_refused(
    guarded: ServerProcess, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    request, alone_s = load
    with (
        open_callers(guarded.target, request, [HONEST]) as (honest,),
        open_callers(guarded.target, request, [FLOOD] * 4) as flood,
        ThreadPoolExecutor(1) as threads,
    ):
        alone_times_s = [honest.call() for _ in range(20)]
        flooding = threads.submit(call_at_rate, flood, 3 / alone_s, 2.5, 5)
        flooded_times_s = []
        while not flooding.done():
            flooded_times_s.append(honest.call())
        refused_s = flooding.result().refused_s

    assert np.median(flooded_times_s) <= 3 * SLACK * np.median(alone_times_s)
    assert len(refused_s) > len(flooded_times_s) / 4


def test_a_call_that_would_wait_beyond_its_deadline_is_refused_at_once(
    patient_server: ServerProcess, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    slow = pb.DeconvolveRequest()
    slow.CopyFrom(load[0])
    slow.x.shape[0] = 4
    slow.x.raw = 4 * load[0].x.raw
    with (
        open_callers(patient_server.target, slow, [""]) as (caller,),
        deconvd_client.connect(patient_server.target, transport="grpc") as F,
    ):
        caller.call()  # it learns how long calls take
        waiting = [caller.begin() for _ in range(70)]
        wait_until(lambda: F.server_info().devices[0].waiting_calls_count > 45)
        with pytest.raises(grpc.RpcError) as raised:
            caller.begin(timeout_s=2.0).result()
        for call in waiting:
            call.cancel()

    error = error_from_rpc(raised.value)
    assert isinstance(error, UnavailableError), error
    assert re.search(r"would wait for [\d.]+ s, and may wait for [12]\.?\d* s", str(error))


def test_an_operator_may_let_calls_wait_for_long(
    patient_server: ServerProcess, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    request, _ = load
    with open_callers(patient_server.target, request, [""]) as (caller,):
        calls = [caller.begin() for _ in range(30)]
        answers = [call.result() for call in calls]

    assert all(isinstance(answer, pb.DeconvolveResponse) for answer in answers)


def refused_beside_nine_others(target: str, request: pb.DeconvolveRequest) -> int:
    """Make calls by ten threads of our client, see that all are served, and return how many were refused."""
    both = array_from_message("x", request.x)
    pad = both.shape[-1] // 2

    def call_twice(F: deconvd_client.Connection) -> list[np.ndarray]:
        return [F.deconvolution_2d(both, both, pad=pad) for _ in range(2)]

    with deconvd_client.connect(target) as F, ThreadPoolExecutor(10) as threads:
        before = refused_count(F)
        expected = F.deconvolution_2d(both, both, pad=pad)
        results = [threads.submit(call_twice, F) for _ in range(10)]
        for future in results:
            for y in future.result():
                np.testing.assert_array_equal(y, expected)
        return refused_count(F) - before


def test_calls_of_our_client_wait(
    server: ServerProcess, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    assert refused_beside_nine_others(server.target, load[0]) == 0


def test_refused_calls_of_our_client_come_back_until_all_are_served(
    tmp_path: Path, load: tuple[pb.DeconvolveRequest, float]
) -> None:
    with server_process(tmp_path, "--queue-wait-s", "0.03") as server:
        assert refused_beside_nine_others(server.target, load[0]) > 0
