"""A crash inside cuDNN on a card ends one server, and not the next one that the same caller asks."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd.model.geometry import Geometry
from deconvd.model.options import Options
from deconvd.model.problem import Problem, spec_of
from deconvd_server.call.context import CallContext
from deconvd_server.device.cpu import CpuDevice
from tests.devices import deconvolve

pytestmark = pytest.mark.gpu

_END_TIMEOUT_S = 60

_CRASHING_SERVER = """
import signal, sys
from deconvd_server.__main__ import main
from deconvd_server.device.cuda.cudnn.plan import CudnnPlan
from deconvd_server.device.cuda.cudnn.search import EngineSearch

place, number = sys.argv.pop(1), int(sys.argv.pop(1))

class Deadly:
    def __init__(self, method, is_deadly):
        self.method, self.is_deadly = method, is_deadly

    def __call__(self, one, *args):
        if self.is_deadly(one):
            signal.raise_signal(number)
        return self.method(one, *args)

    def __get__(self, one, kind):
        return lambda *args: self(one, *args)

begin, build = EngineSearch.__init__, EngineSearch.build

def remember(search, cudnn, stream, operation, problem, layout):
    search.deadly = problem.kernel == (5, 5)
    begin(search, cudnn, stream, operation, problem, layout)

def build_and_remember(search, proposal):
    plan = build(search, proposal)
    plan.deadly = search.deadly
    return plan

def is_deadly(one):
    return getattr(one, "deadly", False)

EngineSearch.__init__, EngineSearch.build = remember, build_and_remember
if place == "heuristics":
    EngineSearch._configs = Deadly(EngineSearch._configs, is_deadly)
elif place == "build":
    EngineSearch._serialize_plan = Deadly(EngineSearch._serialize_plan, is_deadly)
elif place == "run":
    CudnnPlan.execute = Deadly(CudnnPlan.execute, is_deadly)
main()
"""
"""A server that a signal ends where it searches a plan of cuDNN's for kernels of 5 by 5."""


@contextmanager
def crashing_server(
    directory: Path, place: str, number: int
) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Run such a server for the block, with a plan store; lend it and its log."""
    log = directory / "log"
    command = [sys.executable, "-c", _CRASHING_SERVER, place, str(int(number))]
    command += ["--device", "cuda:0", "--listen", f"unix:{directory}/deconvd.sock"]
    command += ["--plan-store", str(directory / "plans")]
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            assert "listening" in process.stdout.readline(), log.read_text()
            yield process, log
        finally:
            process.kill()


def operands(kernel: int) -> tuple[Array, Array]:
    random = np.random.default_rng(kernel)
    x = random.integers(-2, 3, (2, 8, 16, 16)).astype(np.float32)
    return x, random.integers(-2, 3, (8, 4, kernel, kernel)).astype(np.float32)


def assert_right(y: Array, x: Array, W: Array) -> None:
    device = CpuDevice()
    problem = Problem(spec_of(x), spec_of(W), Geometry())
    expected = deconvolve(device, problem, x, W, None, Options(), CallContext())
    device.close()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-3)


def choices(log: Path, kernel: int) -> list[str]:
    """Return what the log says was chosen for kernels of a size."""
    lines = log.read_text().splitlines()
    return [
        line.split("chose ")[1]
        for line in lines
        if "chose " in line and f"{kernel}, {kernel})" in line
    ]


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("heuristics", signal.SIGFPE),
        ("build", signal.SIGSEGV),
        ("run", signal.SIGABRT),
        ("heuristics", signal.SIGKILL),
    ],
)
def test_a_caller_that_tries_again_gets_its_result_from_the_next_server(
    tmp_path: Path, place: str, number: signal.Signals
) -> None:
    x, W = operands(5)
    target = f"unix:{tmp_path}/deconvd.sock"
    with (
        ThreadPoolExecutor(1) as caller,
        deconvd_client.connect(target, timeout_s=100) as F,
        F.using_config("use_cudnn", "always"),
    ):
        with crashing_server(tmp_path, place, number) as (server, _):
            call = caller.submit(copy_context().run, F.deconvolution_2d, x, W)
            assert server.wait(_END_TIMEOUT_S) == -number

        with crashing_server(tmp_path, place, number) as (server, log):
            assert_right(call.result(_END_TIMEOUT_S), x, W)

            others = operands(3)
            assert_right(F.deconvolution_2d(*others), *others)

            assert server.poll() is None
            assert log.read_text().count("without cuDNN") == 1
            assert not any(choice.startswith("cudnn") for choice in choices(log, 5))
            assert all(choice.startswith("cudnn") for choice in choices(log, 3))
            assert len(choices(log, 3)) == 1
            server.terminate()
            assert server.wait(_END_TIMEOUT_S) == 0

        with crashing_server(tmp_path, place, number) as (server, _):
            assert_right(F.deconvolution_2d(x, W), x, W)
            assert server.poll() is None


def test_a_crash_in_a_search_that_no_call_waits_for_costs_a_retry_and_is_not_repeated(
    tmp_path: Path,
) -> None:
    x, W = operands(5)
    target = f"unix:{tmp_path}/deconvd.sock"

    def call_until(ends: Callable[[], bool]) -> None:
        while not ends():
            assert_right(F.deconvolution_2d(x, W), x, W)

    with ThreadPoolExecutor(1) as caller, deconvd_client.connect(target, timeout_s=100) as F:
        may_end = threading.Event()
        with crashing_server(tmp_path, "heuristics", signal.SIGFPE) as (server, _):
            calls = caller.submit(call_until, may_end.is_set)
            assert server.wait(_END_TIMEOUT_S) == -signal.SIGFPE

        with crashing_server(tmp_path, "heuristics", signal.SIGFPE) as (server, log):
            may_end.set()
            calls.result(_END_TIMEOUT_S)
            call_until(lambda: bool(choices(log, 5)))
            assert "without cuDNN" in log.read_text()
            assert not any(choice.startswith("cudnn") for choice in choices(log, 5))
            assert server.poll() is None
