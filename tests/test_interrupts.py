"""Interrupts at any moment of a call, by every way: nothing stays locked, and no answer is wrong."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from tests.interrupts import (
    AlarmError,
    InterruptError,
    InterruptOutcome,
    interrupt_at_random,
    interrupt_everywhere,
)
from tests.servers import ServerProcess, only_server, server_process

# what an interrupted call has opened is closed when it is dropped
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

_FEW_RUNS_COUNT = 20
_RUNS_COUNT = 120
"""Interrupted runs of each kind of work by each way."""

_BOUND_S = 15.0
"""More than a call takes on a busy machine, and less than a call's deadline: what takes longer hangs."""

_TIMEOUT_S = 30.0

_BORROWED_BYTES = 512 << 20
"""More than the largest of these calls needs, several times over."""

Work = Callable[[Connection], None]


@dataclass(frozen=True)
class Case:
    """A call, and what it must return."""

    x: Array
    W: Array
    y: Array


_random = np.random.default_rng(0)


def case(samples_count: int, pixels_count: int) -> Case:
    """Return a case of 8 to 4 channels, in whole numbers, so that its result is exact."""
    x = _random.integers(-8, 8, (samples_count, 8, pixels_count, pixels_count)).astype("f4")
    W = _random.integers(-8, 8, (8, 4, 2, 2)).astype("f4")
    # kernel and stride are alike, so that each pixel makes pixels of its own
    y = np.einsum("nihw,iokl->nohkwl", x, W).reshape(samples_count, 4, *2 * (2 * pixels_count,))
    return Case(x, W, y)


SMALL = case(1, 8)
MIDDLE = case(2, 128)
LARGE = case(16, 128)


def check(y: Array, wanted: Case) -> None:
    check_equal(y, wanted.y)


def check_equal(array: Array, wanted: Array) -> None:
    # not by numpy.array_equal, which takes an exception that strikes it for a difference
    assert array.shape == wanted.shape
    assert (array == wanted).all()


def call_small(F: Connection) -> None:
    check(F.deconvolution_2d(SMALL.x, SMALL.W, stride=2), SMALL)


def call_middle(F: Connection) -> None:
    check(F.deconvolution_2d(MIDDLE.x, MIDDLE.W, stride=2), MIDDLE)


def call_large(F: Connection) -> None:
    check(F.deconvolution_2d(LARGE.x, LARGE.W, stride=2), LARGE)


def call_with_memory_of_ours(F: Connection) -> None:
    x = F.empty(MIDDLE.x.shape, MIDDLE.x.dtype)
    x[...] = MIDDLE.x
    check(F.deconvolution_2d(x, MIDDLE.W, stride=2), MIDDLE)


def call_with_residents(F: Connection) -> None:
    with F.put(MIDDLE.W) as W, F.put(MIDDLE.x) as x:
        y = F.remote.deconvolution_2d(x, W, stride=2)
        check_equal(x.numpy(), MIDDLE.x)
        check(y.numpy(), MIDDLE)


WORK: dict[str, Work] = {
    "small": call_small,
    "middle": call_middle,
    "large": call_large,
    "empty": call_with_memory_of_ours,
    "residents": call_with_residents,
}

WAYS = ("shared_memory", "unix", "tcp", "grpc")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a Unix socket and a port."""
    directory: Path = tmp_path_factory.mktemp("server")
    with server_process(directory, listen=("unix", "127.0.0.1:0")) as running:
        yield running


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def G(both: ServerProcess, way: str) -> Iterator[Connection]:
    """A connection by each way, which must still serve at the end, by the same way, and close in time."""
    target = both.targets[1] if way in ("tcp", "grpc") else both.targets[0]
    G = deconvd_client.connect(target, transport=way, timeout_s=_TIMEOUT_S)
    for work in WORK.values():
        work(G)
    yield G
    for work in WORK.values():
        within_bound(partial(work, G))
    check_way(G, way)
    within_bound(G.close)


def check_way(G: Connection, way: str) -> None:
    """Check that calls go by the way that they went before."""
    array = G.empty(MIDDLE.x.shape, "f4")
    assert (only_server(G).borrower.locate(array) is not None) == (way == "shared_memory")
    assert only_server(G).borrower.borrowed_bytes <= _BORROWED_BYTES
    direct = only_server(G).route.target_stub.direct
    assert (direct is None) == (way == "grpc")
    if direct is not None:
        assert direct.may_connect
        assert not [line for line in direct._busy if line() is not None]
        assert direct._idle


def within_bound(work: Callable[[], object]) -> None:
    begin_s = time.monotonic()
    work()
    assert time.monotonic() - begin_s < _BOUND_S


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize(
    ("error", "strikes_count", "runs_count"),
    [
        pytest.param(InterruptError, 1, _FEW_RUNS_COUNT, id="briefly"),
        pytest.param(InterruptError, 1, _RUNS_COUNT, id="once", marks=pytest.mark.slow),
        pytest.param(InterruptError, 3, _RUNS_COUNT, id="thrice", marks=pytest.mark.slow),
        pytest.param(AlarmError, 1, _RUNS_COUNT, id="alarm", marks=pytest.mark.slow),
    ],
)
def test_calls_are_right_whenever_interrupts_strike(
    G: Connection, name: str, error: type[BaseException], strikes_count: int, runs_count: int
) -> None:
    work = WORK[name]
    begin_s = time.monotonic()
    for _ in range(3):
        work(G)
    usual_s = (time.monotonic() - begin_s) / 3
    chance = random.Random(name)
    outcomes: Counter[InterruptOutcome] = Counter()
    for number in range(runs_count):
        begin_s = time.monotonic()
        outcomes[
            interrupt_at_random(
                lambda: work(G), chance, usual_s / 2, strikes_count=strikes_count, error=error
            )
        ] += 1
        if number % 10 == 0:
            work(G)
        assert time.monotonic() - begin_s < _BOUND_S
    # Python ignores what strikes in a finalizer
    assert outcomes[InterruptOutcome.LOST] <= runs_count / 20, outcomes


@pytest.mark.parametrize(
    "name", ["small", *(pytest.param(n, marks=pytest.mark.slow) for n in ("middle", "residents"))]
)
def test_calls_are_right_wherever_an_interrupt_strikes(G: Connection, name: str) -> None:
    work = WORK[name]
    begin_s = time.monotonic()
    for _ in interrupt_everywhere(lambda: work(G)):
        assert time.monotonic() - begin_s < _BOUND_S
        begin_s = time.monotonic()
