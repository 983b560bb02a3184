"""Servers in real cgroups, where the host has more than they may take."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from deconvd.model.dtypes import Array
from deconvd_client import Connection, ExhaustedError, RemoteTensor, connect
from tests.cgroups import cgroup
from tests.servers import server_process

MEMORY_BYTES = 600_000_000
X = np.ones((1, 8, 16, 16), np.float32)
W = np.ones((8, 4, 4, 4), np.float32)


def tensor(size_bytes: int, value: float) -> Array:
    return np.full((1, 1, 1000, size_bytes // 4000), value, np.float32)


def put_tensors(F: Connection, count: int) -> list[RemoteTensor]:
    """Put tensors of 16 MB, and return those that the server has room for."""
    kept = []
    for number in range(count):
        with suppress(ExhaustedError):
            kept.append(F.put(tensor(16_000_000, number)))
    return kept


@pytest.mark.parametrize("transport", ["grpc", "unix", "shared_memory"])
def test_puts_beyond_the_memory_of_a_container_do_not_end_its_server(
    tmp_path: Path, transport: str
) -> None:
    with (
        cgroup(memory_bytes=MEMORY_BYTES) as group,
        server_process(tmp_path, within=group) as server,
        connect(server.target, transport=transport) as F,
    ):
        kept = put_tensors(F, 40)
        with pytest.raises(ExhaustedError):
            F.put(tensor(64_000_000, 1))

        assert kept
        assert F.deconvolution_2d(X, W).shape == (1, 4, 19, 19)
        assert group.kills_count == 0
        assert group.peak_memory_bytes < MEMORY_BYTES * 0.9


@pytest.mark.parametrize("transport", ["grpc", "unix", "shared_memory"])
def test_fifteen_who_put_at_once_are_served_or_refused_and_calls_go_on(
    tmp_path: Path, transport: str
) -> None:
    with (
        cgroup(memory_bytes=MEMORY_BYTES) as group,
        server_process(tmp_path, within=group) as server,
        ExitStack() as stack,
        ThreadPoolExecutor(15) as threads,
    ):
        connections = [
            stack.enter_context(connect(server.target, transport=transport)) for _ in range(15)
        ]
        kept = list(threads.map(lambda F: put_tensors(F, 1), connections))

        assert any(kept)  # and who was refused got an ExhaustedError
        assert group.kills_count == 0
        assert group.peak_memory_bytes < MEMORY_BYTES * 0.9
        with connect(server.target) as F:
            assert F.deconvolution_2d(X, W).shape == (1, 4, 19, 19)


def test_a_server_says_what_its_container_leaves_it(tmp_path: Path) -> None:
    with (
        cgroup(memory_bytes=MEMORY_BYTES, processors_count=1) as group,
        server_process(tmp_path, within=group) as server,
        connect(server.target) as F,
    ):
        (device,) = F.server_info().devices

    assert device.memory_bytes == pytest.approx(MEMORY_BYTES, abs=4096)
    assert device.threads_count == 1
