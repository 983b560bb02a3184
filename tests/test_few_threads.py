"""Streams where the system has no thread left for the server: in a cgroup of few tasks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from deconvd_client import connect
from tests.cgroups import cgroup
from tests.processes import process_resources, wait_until
from tests.servers import ServerProcess, server_process

TASKS_COUNT = 200
X = np.ones((1, 4, 8, 8), np.float32)
W = np.ones((4, 4, 3, 3), np.float32)
LARGE_X = np.ones((16, 1, 1024, 1024), np.float32)
LARGE_W = np.ones((1, 1, 1, 1), np.float32)


@contextmanager
def taken_threads(server: ServerProcess) -> Iterator[None]:
    """Take all the threads that there are for the block, with idle direct connections."""
    with ExitStack() as stack:
        while process_resources(server.process.pid).threads_count < TASKS_COUNT:
            F = stack.enter_context(connect(server.target, transport="unix", timeout_s=10))
            F.deconvolution_2d(X, W)
        yield


@pytest.mark.parametrize("transport", ["grpc", "unix"])
def test_a_stream_is_served_where_there_are_no_threads_left(transport: str, tmp_path: Path) -> None:
    with (
        cgroup(tasks_count=TASKS_COUNT) as group,
        server_process(tmp_path, within=group) as server,
        connect(server.target, transport=transport, timeout_s=20) as F,
    ):
        F.deconvolution_2d(X, W)
        with taken_threads(server):
            assert process_resources(server.process.pid).threads_count == TASKS_COUNT
            for _ in range(3):
                assert (F.deconvolution_2d(LARGE_X, LARGE_W) == LARGE_X).all()
        wait_until(lambda: process_resources(server.process.pid).threads_count < TASKS_COUNT // 2)
        assert (F.deconvolution_2d(LARGE_X, LARGE_W) == LARGE_X).all()
        assert "unforeseen" not in server.log.read_text()
