"""Striped calls to a real server: the same bits as by every other way, and no way that fails loses a call."""

from __future__ import annotations

import gc
import os
import random
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import deconvd_client
from deconvd.errors import CallCancelledError, DeadlineError
from deconvd.model.dtypes import Array
from deconvd.model.problem import spec_of
from deconvd.wire.digest import digest_of
from deconvd_client import Connection
from deconvd_client.transports.direct import (
    connectors,
    pool,
    striped_transport,
    striping_policy,
)
from deconvd_client.transports.direct.striped_transport import StripedTransport
from deconvd_client.transports.direct.striping_policy import StripingPolicy
from tests.direct_calls import get_server_info
from tests.fault_proxy import CLEAN, Direction, Fault, LinkConditions, faulty_proxy
from tests.interrupts import InterruptError, InterruptOutcome, interrupt_at_random
from tests.processes import exit_code, process_resources, wait_until
from tests.servers import ServerProcess, only_server, server_process

RANDOM = np.random.default_rng(0)

PROCESSORS_COUNT = 16
"""So many let a call have all stripes."""

X = RANDOM.integers(-3, 4, (40, 4, 96, 96)).astype(np.float32)
FILTER = RANDOM.integers(-3, 4, (4, 3, 2, 2)).astype(np.float32)
BIAS = RANDOM.integers(-3, 4, 3).astype(np.float32)
"""6 MB there and 18 back, in whole numbers: each sum is exact in any order."""

COMMON_X = RANDOM.integers(-3, 4, (28, 16, 48, 48)).astype(np.float32)
COMMON_FILTER = RANDOM.integers(-3, 4, (16, 16, 8, 8)).astype(np.float32)
"""A filter that is large enough to be named by its digest."""

ENDLESS = np.ones((40, 64, 64, 64), np.float32), np.ones((64, 64, 15, 15), np.float32)
"""Longer than a test needs to break it off."""

TRANSPORTS = pytest.mark.parametrize("transport", ["unix", "tcp"])


@pytest.fixture(autouse=True)
def _always_striped(monkeypatch: pytest.MonkeyPatch, patient: None) -> None:
    """Have all calls striped that may be, however few processors there are and whatever pays."""
    monkeypatch.setattr(striped_transport, "processors_count", lambda: PROCESSORS_COUNT)
    monkeypatch.setattr(striped_transport, "_PATIENCE_S", 30.0)
    monkeypatch.setattr(pool, "_CONNECT_PATIENCE_S", 30.0)
    monkeypatch.setattr(connectors, "_UNIX_CONNECT_TIMEOUT_S", 30.0)
    monkeypatch.setattr(
        StripingPolicy, "choose", lambda self, _, size_bytes: self.candidates(size_bytes)[-1]
    )


@pytest.fixture
def _small_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have calls striped that have fewer pieces than stripes."""
    monkeypatch.setattr(striping_policy, "_MIN_STRIPE_BYTES", 1)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with started_server(tmp_path_factory.mktemp("server")) as server:
        yield server


def started_server(directory: Path, **options: Any) -> AbstractContextManager[ServerProcess]:
    listen = ("unix", "127.0.0.1:0")
    return server_process(directory, "--log-level", "debug", listen=listen, **options)


@pytest.fixture(params=["unix", "tcp"])
def F(request: pytest.FixtureRequest, running: ServerProcess) -> Iterator[Connection]:
    target = running.targets[request.param == "tcp"]
    with deconvd_client.connect(target, transport=request.param) as connection:
        yield connection


@pytest.fixture
def G(running: ServerProcess) -> Iterator[Connection]:
    """A connection that stripes nothing."""
    with deconvd_client.connect(running.target, transport="grpc") as connection:
        yield connection


def striped_calls(server: ServerProcess) -> list[str]:
    """Return the names of the striped calls that a server has begun, each with its number of stripes."""
    lines = server.log.read_text().splitlines()
    return [
        f"{line.split(' from ')[0].split()[-1]} {line.split()[-2]}"
        for line in lines
        if line.endswith(" stripes")
    ]


@contextmanager
def striped(server: ServerProcess, *calls: str) -> Iterator[None]:
    """Check that the block makes these striped calls, and no others."""
    before_count = len(striped_calls(server))
    yield
    assert striped_calls(server)[before_count:] == list(calls)


def assert_same(array: Array | None, expected: Array | None) -> None:
    assert (array is None) == (expected is None)
    if array is not None and expected is not None:
        assert array.dtype == expected.dtype
        assert array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("with_b", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_striped_calls_have_the_same_bits_as_all_others(
    running: ServerProcess, F: Connection, G: Connection, dtype: Any, with_b: bool
) -> None:
    factor = 4 // np.dtype(dtype).itemsize or 1
    x, W, b = (np.concatenate([X] * factor).astype(dtype), FILTER.astype(dtype), BIAS.astype(dtype))
    arguments = (x, W, b if with_b else None, 2)
    with striped(running, f"Deconvolve {2 if dtype is not np.float64 else 4}"):
        y = F.deconvolution_2d(*arguments)
    assert_same(y, G.deconvolution_2d(*arguments))
    with deconvd_client.connect(running.target, transport="shared_memory") as by_memory:
        assert_same(y, by_memory.deconvolution_2d(*arguments))
    for sample in (0, len(x) - 1):  # in messages
        assert_same(
            y[sample], F.deconvolution_2d(x[sample : sample + 1], W, b if with_b else None, 2)[0]
        )


@pytest.mark.parametrize(
    "wanted", [("gx", "gW", "gb"), ("gx",), ("gW", "gb"), ("gb",)], ids="-".join
)
def test_striped_gradients_have_the_same_bits_as_others(
    running: ServerProcess, F: Connection, G: Connection, wanted: tuple[str, ...]
) -> None:
    gy = RANDOM.integers(-3, 4, (40, 3, 192, 192)).astype(np.float32)
    arguments = (X, FILTER, BIAS, gy, 2)
    with striped(running, "DeconvolveGrad 2"):
        gradients = F.deconvolution_2d_grad(*arguments, wanted=wanted)
    for gradient, expected in zip(
        gradients, G.deconvolution_2d_grad(*arguments, wanted=wanted), strict=True
    ):
        assert_same(gradient, expected)


@pytest.mark.parametrize(
    "lay_out",
    [
        pytest.param(lambda x: x.astype(x.dtype.newbyteorder(">")), id="big-endian"),
        pytest.param(lambda x: np.asfortranarray(x), id="columns first"),
        pytest.param(lambda x: np.repeat(x, 2, axis=3)[..., ::2], id="every other"),
        pytest.param(lambda x: x[::-1][:, :, ::-1].copy()[::-1][:, :, ::-1], id="reversed"),
        pytest.param(lambda x: _read_only(x), id="read-only"),
    ],
)
def test_operands_of_any_layout_are_striped(
    running: ServerProcess, F: Connection, G: Connection, lay_out: Callable[[Array], Array]
) -> None:
    x = lay_out(X)
    with striped(running, "Deconvolve 2"):
        y = F.deconvolution_2d(x, FILTER, BIAS, 2)
    assert_same(y, G.deconvolution_2d(X, FILTER, BIAS, 2))


def _read_only(x: Array) -> Array:
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.usefixtures("_small_calls_too")
@pytest.mark.parametrize("shape", [(1, 4, 100, 100), (3, 4, 1, 9000)], ids=str)
def test_calls_of_few_pieces_may_be_striped(
    running: ServerProcess, F: Connection, G: Connection, shape: tuple[int, ...]
) -> None:
    x = RANDOM.integers(-3, 4, shape).astype(np.float32)
    W = RANDOM.integers(-3, 4, (4, 100, 5, 7)).astype(np.float32)
    with striped(running, "Deconvolve 8"):
        y = F.deconvolution_2d(x, W)
    assert_same(y, G.deconvolution_2d(x, W))


def test_a_call_without_samples_may_be_striped(
    running: ServerProcess, F: Connection, G: Connection
) -> None:
    x, gy = np.ones((0, 64, 8, 8), np.float32), np.ones((0, 1024, 16, 16), np.float32)
    W = np.ones((64, 1024, 9, 9), np.float32)
    with striped(running, "DeconvolveGrad 2"):
        gradients = F.deconvolution_2d_grad(x, W, None, gy, wanted=["gW"])
    assert_same(gradients.gW, np.zeros_like(W))


def test_what_the_server_has_is_not_sent_in_stripes(
    running: ServerProcess, F: Connection, G: Connection
) -> None:
    expected = G.deconvolution_2d(COMMON_X, COMMON_FILTER, None, 2)
    F.deconvolution_2d(COMMON_X, COMMON_FILTER, None, 2)
    with striped(running, "Deconvolve 2"):  # by its digest
        assert_same(F.deconvolution_2d(COMMON_X, COMMON_FILTER, None, 2), expected)
    with F.put(COMMON_FILTER) as resident, striped(running, "Deconvolve 2"):
        assert_same(F.deconvolution_2d(COMMON_X, resident, None, 2), expected)
    expected = G.deconvolution_2d(X, FILTER, None, 2)
    with F.put(X) as resident, striped(running, "Deconvolve 2"):
        assert_same(F.deconvolution_2d(resident, FILTER, None, 2), expected)
    with striped(running, "Deconvolve 2"):
        kept = F.remote.deconvolution_2d(np.concatenate([X] * 3), FILTER, None, 2)
    assert_same(kept.numpy()[:40], expected)
    kept.close()


def test_an_operand_that_the_server_lacks_after_all_is_sent(
    running: ServerProcess, F: Connection, G: Connection
) -> None:
    x, W = COMMON_X, COMMON_FILTER + 1
    expected = G.deconvolution_2d(x, W, None, 2)
    residents = only_server(F).residents
    F.deconvolution_2d(x, COMMON_FILTER)  # so that there is a session
    residents.known_digests.learn(residents.session_name, spec_of(W), digest_of(W))
    with striped(running, "Deconvolve 2", "Deconvolve 2"):  # the first names W, the second sends it
        assert_same(F.deconvolution_2d(x, W, None, 2), expected)


def test_calls_with_options_are_striped(
    running: ServerProcess, F: Connection, G: Connection
) -> None:
    with F.using_config("use_cudnn", "never"), striped(running, "Deconvolve 2"):
        y = F.deconvolution_2d(X, FILTER, BIAS, 2)
    assert F.last_ledger["server_us"] > 0
    assert_same(y, G.deconvolution_2d(X, FILTER, BIAS, 2))


def test_deterministic_calls_have_the_same_bits_whether_or_not_others_are_striped(
    running: ServerProcess, F: Connection, G: Connection
) -> None:
    gy = G.deconvolution_2d(X, FILTER, None, 2)
    with (
        F.using_config("cudnn_deterministic", True),
        G.using_config("cudnn_deterministic", True),
        striped(running),
    ):
        pairs = zip(
            F.deconvolution_2d_grad(X, FILTER, BIAS, gy, 2),
            G.deconvolution_2d_grad(X, FILTER, BIAS, gy, 2),
            strict=True,
        )
    for one, other in pairs:
        assert_same(one, other)


@TRANSPORTS
def test_a_deadline_ends_a_striped_call(running: ServerProcess, transport: str) -> None:
    target = running.targets[transport == "tcp"]
    with deconvd_client.connect(target, transport=transport, timeout_s=2) as hasty:
        x, W = ENDLESS
        with (
            hasty.put(W) as resident,
            striped(running, "Deconvolve 8"),
            pytest.raises(DeadlineError),
        ):
            hasty.deconvolution_2d(x, resident)
        y = hasty.deconvolution_2d(X[:1], FILTER, None, 2)
    assert y.shape == (1, 3, 192, 192)


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.CLOSE])
@pytest.mark.parametrize("direction", Direction)
def test_a_broken_stripe_costs_a_retry(
    running: ServerProcess, G: Connection, direction: Direction, fault: Fault
) -> None:
    expected = G.deconvolution_2d(X, FILTER, None, 2)
    port = get_server_info(running).direct_port
    broken = LinkConditions(fault=fault, direction=direction, after_bytes=1 << 20)
    with (
        faulty_proxy(running.targets[1], CLEAN, host="127.0.0.2") as proxy,
        faulty_proxy(
            f"127.0.0.1:{port}", CLEAN, broken, CLEAN, host="127.0.0.2", own_port=port
        ) as direct_proxy,
        deconvd_client.connect(proxy.target, transport="tcp") as F,
    ):
        calls_count, before_count = 0, len(striped_calls(running))
        while direct_proxy.faults_count == 0:  # a stripe that is late has little to carry
            assert_same(F.deconvolution_2d(X, FILTER, None, 2), expected)
            calls_count += 1
        assert direct_proxy.faults_count == 1
        assert striped_calls(running)[before_count:] == ["Deconvolve 2"] * calls_count
        striped_transport_of(F)._backoff.note_success()
        with striped(running, "Deconvolve 2"):
            assert_same(F.deconvolution_2d(X, FILTER, None, 2), expected)


def striped_transport_of(F: Connection) -> StripedTransport:
    stub = only_server(F).route.current_stub
    assert stub is not None
    assert stub.striped is not None
    return stub.striped


def test_connections_that_the_server_closes_are_opened_again(tmp_path: Path) -> None:
    few = {
        "deconvd_server.transports.direct.server:_CONNECTIONS_COUNT": 4,
        "deconvd_server.transports.direct.server:_RESERVED_CONNECTIONS_COUNT": 0,
    }
    with started_server(tmp_path, constants=few) as server:
        with deconvd_client.connect(server.targets[1], transport="tcp") as F:
            x = np.concatenate([X] * 3)
            expected = F.deconvolution_2d(x[:40], FILTER, None, 2)
            for _ in range(5):
                assert_same(F.deconvolution_2d(x, FILTER, None, 2)[80:], expected)
        assert any(call.startswith("Deconvolve") for call in striped_calls(server))


@TRANSPORTS
def test_closing_the_connection_ends_a_striped_call(running: ServerProcess, transport: str) -> None:
    F = deconvd_client.connect(running.targets[transport == "tcp"], transport=transport)
    x, W = ENDLESS
    resident = F.put(W)
    before_count = len(striped_calls(running))
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(F.deconvolution_2d, x, resident)
        wait_until(lambda: len(striped_calls(running)) > before_count)
        F.close()
        with pytest.raises(CallCancelledError):
            endless.result()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_striped_calls_are_right_whenever_interrupts_strike(
    running: ServerProcess, F: Connection
) -> None:
    expected = F.deconvolution_2d(X, FILTER, None, 2)
    chance = random.Random(0)

    def work() -> None:
        assert (F.deconvolution_2d(X, FILTER, None, 2) == expected).all()

    begin_s = time.monotonic()
    work()
    usual_s = time.monotonic() - begin_s
    outcomes: Counter[InterruptOutcome] = Counter()
    for _ in range(20):
        begin_s = time.monotonic()
        outcomes[interrupt_at_random(work, chance, usual_s / 2)] += 1
        assert time.monotonic() - begin_s < 15
    assert outcomes[InterruptOutcome.RAISED], outcomes
    work()
    direct = only_server(F).route.target_stub.direct
    assert direct is not None
    assert not [known for known in direct._busy if known() is not None]


def test_an_interrupted_call_leaves_the_callers_arrays_alone(F: Connection) -> None:
    expected = F.deconvolution_2d(X, FILTER, None, 2)
    chance = random.Random(1)
    for _ in range(5):
        x = X.copy()
        with suppress(InterruptError):
            interrupt_at_random(partial(F.deconvolution_2d, x, FILTER, None, 2), chance, 0.02)
        known = weakref.ref(x)
        del x
        wait_until(partial(_is_freed, known))
    assert_same(F.deconvolution_2d(X, FILTER, None, 2), expected)


def _is_freed(known: weakref.ref[Array]) -> bool:
    gc.collect()  # the interrupt's traceback may be a part of a cycle
    return known() is None


def test_children_make_striped_calls(running: ServerProcess, F: Connection) -> None:
    expected = F.deconvolution_2d(X, FILTER, None, 2)

    def is_right() -> bool:
        return bool((F.deconvolution_2d(X, FILTER, None, 2) == expected).all())

    with striped(running, "Deconvolve 2", "Deconvolve 2"):
        assert exit_code(is_right) == 0
        assert is_right()


def test_threads_stripe_at_the_same_time(running: ServerProcess, F: Connection) -> None:
    xs = [X + i for i in range(4)]
    expected = [F.deconvolution_2d(x, FILTER, None, 2) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for y, right in zip(
                pool.map(lambda x: F.deconvolution_2d(x, FILTER, None, 2), xs),
                expected,
                strict=True,
            ):
                assert_same(y, right)


def test_striped_calls_leave_nothing_behind(running: ServerProcess, F: Connection) -> None:
    def run() -> None:
        F.deconvolution_2d(X, FILTER, None, 2)

    for _ in range(3):
        run()
    before = process_resources(os.getpid()), process_resources(running.process.pid)
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            run()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        frames = [thing for thing in gc.garbage if isinstance(thing, (FrameType, np.ndarray))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not frames
    after = process_resources(os.getpid()), process_resources(running.process.pid)
    for one, other in zip(before, after, strict=True):
        assert other.descriptors_count <= one.descriptors_count
        assert other.threads_count <= one.threads_count + 4  # some end a moment before others begin


def test_a_status_tells_of_all_connections(F: Connection) -> None:
    F.deconvolution_2d(X, FILTER, None, 2)
    assert "3 direct connections" in repr(F)


def test_two_processors_stripe_nothing(
    running: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(striped_transport, "processors_count", lambda: 2)
    with (
        deconvd_client.connect(running.targets[1], transport="tcp") as F,
        striped(running),
    ):
        for _ in range(4):  # the first goes by gRPC if there is no direct connection yet
            F.deconvolution_2d(X, FILTER, None, 2)
