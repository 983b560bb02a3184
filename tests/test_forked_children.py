"""Forked children that use their parent's connection: they begin anew on every way, and the parent goes on."""

from __future__ import annotations

import faulthandler
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd_client import Connection, DeconvdError, UnavailableError
from tests.processes import exit_code
from tests.servers import ServerProcess, server_process

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

_TIMEOUT_S = 12.0
_RAISED = 2
"""Exit code of a child whose work raised."""

_CHILD_S = 60
"""More than a child takes for its calls, if it does not hang in gRPC."""

_CHILDREN_S = 35
"""More than children take for their calls, and less than a test may for three tries."""

W = np.ones((8, 4, 2, 2), "f4")
SMALL = np.ones((1, 8, 8, 8), "f4")
LARGE = np.ones((24, 8, 128, 128), "f4")

WAYS = ("auto", "shared_memory", "unix", "tcp", "grpc", "grpc alone")


def is_right(F: Connection, x: Array) -> bool:
    y = F.deconvolution_2d(x, W, stride=2)
    return y.shape == (len(x), 4, 2 * x.shape[2], 2 * x.shape[3]) and bool((y == 8).all())


def succeeds_in_a_child(work: Callable[[], bool], *, timeout_s: int = _CHILD_S) -> bool:
    """Return whether `work` returns True in a forked child, and that no child hangs.

    gRPC's core may be at work in a fork, whatever is done against it; while there is a session, a thread of its own
    always is. Then the child's calls by gRPC end at their deadline, or the child itself in gRPC. That is rare, so one
    of three children must do.
    """
    for _ in range(3):
        with TemporaryFile("w+") as crash:

            def traced(crash: IO[str] = crash) -> bool:
                faulthandler.enable(crash)
                return work()

            code = exit_code(traced, timeout_s=timeout_s)
            crash.seek(0)
            assert code in (0, _RAISED) or is_grpcs(crash.read()), f"exit code {code}"
        if code == 0:
            return True
    return False


def is_grpcs(crash: str) -> bool:
    """Return whether it was in gRPC that a process crashed, as `faulthandler` tells: in its threads, or in its code."""
    _, _, stack = crash.partition("Current thread")
    return crash.startswith("Fatal Python error") and (
        not stack or "/grpc/" in stack.splitlines()[1]
    )


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """A server, and one that takes no direct calls."""
    listen = ("unix", "127.0.0.1:0")
    directories = [tmp_path_factory.mktemp("server") for _ in range(2)]
    with (
        server_process(directories[0], listen=listen) as server,
        server_process(directories[1], "--no-direct-calls", listen=listen) as alone,
    ):
        yield {"server": server, "alone": alone}


@pytest.fixture(params=WAYS)
def F(servers: dict[str, ServerProcess], request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection by each way, that has been used in every manner."""
    way = str(request.param)
    targets = servers["alone" if way == "grpc alone" else "server"].targets
    target = targets[0] if way in ("unix", "shared_memory") else targets[1]
    transport = "auto" if way == "grpc alone" else way
    with deconvd_client.connect(target, transport=transport, timeout_s=_TIMEOUT_S) as F:
        assert is_right(F, SMALL)
        assert is_right(F, LARGE)
        yield F


def test_a_child_and_its_parent_both_go_on(F: Connection) -> None:
    kept = F.put(W)
    assert (F.deconvolution_2d(SMALL, kept, stride=2) == 8).all()

    def call_and_close() -> bool:
        are_right = is_right(F, SMALL) and is_right(F, LARGE)
        begin_s = time.monotonic()
        F.close()
        return are_right and time.monotonic() - begin_s < 10

    assert succeeds_in_a_child(call_and_close)
    assert succeeds_in_a_child(
        lambda: succeeds_in_a_child(call_and_close) and call_and_close(),
        timeout_s=3 * _CHILD_S,  # its own child may hang
    )
    assert is_right(F, LARGE)
    assert (F.deconvolution_2d(SMALL, kept, stride=2) == 8).all()
    assert (kept.numpy() == W).all()


def test_a_child_is_told_that_tensors_stay_with_its_parent(F: Connection) -> None:
    kept = F.put(W)

    def use() -> bool:
        for refused in (kept.numpy, lambda: F.put(W), lambda: F.deconvolution_2d(SMALL, kept)):
            with pytest.raises(UnavailableError, match="a forked child"):
                refused()
        kept.close()
        return True

    assert exit_code(use) == 0
    assert (kept.numpy() == W).all()


def test_children_may_be_forked_while_threads_call(F: Connection) -> None:
    kept = F.put(W)
    is_over = threading.Event()
    wrong: list[Array] = []

    def call(x: Array) -> None:
        while not is_over.is_set():
            if not is_right(F, x):
                wrong.append(x)

    threads = [threading.Thread(target=call, args=(x,)) for x in (SMALL, LARGE)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            assert succeeds_in_a_child(lambda: is_right(F, SMALL) and is_right(F, LARGE))
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert (kept.numpy() == W).all()


_F: Connection


def call_in_pool(samples_count: int) -> bool:
    return is_right(_F, LARGE[:samples_count])


def trace(path: Path) -> None:
    faulthandler.enable(path.open("a"))


def succeeds_in_a_pool(crash: Path) -> bool:
    """Return whether a pool answers, and that what it answers is right. See `succeeds_in_a_child`."""
    with multiprocessing.get_context("fork").Pool(3, trace, (crash,)) as pool:
        try:
            assert all(pool.map_async(call_in_pool, [1, 24, 2, 24, 3, 24]).get(_CHILDREN_S))
        except DeconvdError:
            return False
        except multiprocessing.TimeoutError:  # a pool waits for ever for one that has crashed
            assert is_grpcs(crash.read_text()), "a child hangs"
            return False
    return True


def test_a_pool_of_forked_processes_calls(F: Connection, tmp_path: Path) -> None:
    global _F
    _F = F
    kept = F.put(W)
    assert any(succeeds_in_a_pool(tmp_path / f"crash {number}") for number in range(3))
    assert (kept.numpy() == W).all()


SCRIPT = """
import os, sys
import numpy as np
import deconvd_client
from tests.test_forked_children import LARGE, SMALL, W, is_right
F = deconvd_client.connect(sys.argv[1], transport="grpc", timeout_s=20)
kept = F.put(W)
assert is_right(F, LARGE)
child = os.fork()
assert is_right(F, SMALL)
assert is_right(F, LARGE)
if child:
    assert os.waitpid(child, 0) == (child, 0)
    assert (kept.numpy() == W).all()
"""


@pytest.mark.usefixtures("unmeasured")
def test_a_child_may_end_as_any_process_does(servers: dict[str, ServerProcess]) -> None:
    """It runs finalizers then, also of what is its parent's."""
    command = [sys.executable, "-c", SCRIPT, servers["alone"].targets[1]]
    assert any(
        subprocess.run(command, timeout=_CHILDREN_S, check=False).returncode == 0 for _ in range(3)
    )
