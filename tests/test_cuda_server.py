"""The server on a card, from the outside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd_client import Connection
from tests.scrapes import metrics_address, scrape
from tests.servers import ServerProcess, server_process

pytestmark = pytest.mark.gpu

X = np.ones((4, 8, 16, 16), np.float32)
W = np.ones((8, 4, 4, 4), np.float32)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with server_process(tmp_path_factory.mktemp("server"), device="cuda") as running:
        yield running


def test_status_shows_cards_memory_and_caches(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target) as F:
        F.deconvolution_2d(X, W)
        (card, *_) = F.server_info().devices

    assert card.id == "cuda:0"
    assert "NVIDIA" in card.name
    assert 0 < card.budget_bytes < card.memory_bytes
    caches = {cache.name: cache for cache in card.caches}
    assert caches["plans"].count > 0
    assert all(cache.limit_bytes > 0 for cache in card.caches)


def test_metrics_tell_cards_caches_and_the_stages_of_calls(tmp_path: Path) -> None:
    with (
        server_process(tmp_path, "--metrics-port", "0", device="cuda:0") as server,
        deconvd_client.connect(server.target) as F,
    ):
        address = metrics_address(server)
        for _ in range(3):
            F.deconvolution_2d(X, W)
        with F.put(X) as x:
            F.deconvolution_2d(x, W)
            scraped = scrape(address)

    caches = {"plans", "device buffers", "pinned buffers", "host buffers", "resident tensors"}
    name = "deconvd_cache_entries"
    assert scraped.label_values(name, "cache") == {*caches, "resident tensors in host memory"}
    assert scraped.label_values(name, "device") == {"cuda:0", "host"}
    assert scraped.value(name, cache="plans") > 0
    assert scraped.value(name, cache="resident tensors", device="cuda:0") == 1
    assert scraped.value("deconvd_cache_hits_total", cache="plans") > 0
    for stage in ("queue", "upload", "compute", "download", "server"):
        assert scraped.value("deconvd_call_stage_seconds_count", stage=stage) >= 4
    assert scraped.value("deconvd_device_memory_bytes", use="reserved") >= X.nbytes
    assert "NVIDIA" in scraped.label_values("deconvd_device_info", "name").pop()


@pytest.mark.parametrize("threads_count", [1, 8])
def test_large_arrays_of_any_kind_are_computed_as_they_are(
    server: ServerProcess, threads_count: int
) -> None:
    """Plain ones are copied while the card takes them; others lie where it reaches them, or in any order."""
    shape = (64, 8, 96, 96)
    filters = np.random.default_rng(0).integers(-2, 3, (8, 4, 2, 2)).astype(np.float16)

    def call(F: Connection, seed: int) -> None:
        source = np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float16)
        lent = F.empty(shape, np.float16)
        lent[...] = source
        for x in (source, lent, source, np.asfortranarray(source), source[:, :, ::-1], source):
            y = F.deconvolution_2d(x, filters, stride=2)
            some = [0, 29, 63]
            right = np.einsum("nihw,ioab->nohawb", x[some], filters, dtype=np.float64)
            np.testing.assert_array_equal(y[some], right.reshape(3, 4, 192, 192))

    with (
        deconvd_client.connect(server.target) as F,
        ThreadPoolExecutor(threads_count) as threads,
    ):
        list(threads.map(partial(call, F), range(threads_count)))


def test_what_can_never_fit_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    limit = ("--device-memory-bytes", str(256 << 20))
    with (
        server_process(tmp_path, *limit, device="cuda") as server,
        deconvd_client.connect(server.target) as F,
    ):
        with pytest.raises(deconvd_client.ExhaustedError, match="of the device's memory"):
            F.deconvolution_2d(np.ones((1, 1, 8192, 8192), np.float32), W[:1, :1])
        assert F.deconvolution_2d(X, W).shape == (4, 4, 19, 19)


def test_a_restarted_server_knows_its_plans(tmp_path: Path) -> None:
    store = tmp_path / "plans"

    cold_y = _y_of_a_new_server(tmp_path, store)
    chosen = _written(store)
    warm_y = _y_of_a_new_server(tmp_path, store)

    assert chosen
    assert _written(store) == chosen
    np.testing.assert_array_equal(cold_y, warm_y)


def _y_of_a_new_server(directory: Path, store: Path) -> Array:
    with (
        server_process(directory, "--plan-store", str(store), device="cuda") as server,
        deconvd_client.connect(server.target) as F,
        F.using_config("cudnn_deterministic", True),
        F.using_config("autotune", True),
    ):
        y = F.deconvolution_2d(X, W)
        assert server.end() == 0
    return y


def _written(store: Path) -> dict[Path, int]:
    """Return when each stored plan was written; kernels, which are stored beside them, are left out."""
    kernels = store / "kernels"
    files = [path for path in store.rglob("*") if path.is_file() and kernels not in path.parents]
    return {path: path.stat().st_mtime_ns for path in files}


_LOSING_SERVER = """
import faulthandler, sys, threading, cupy
import deconvd_server.daemon as daemon
from deconvd_server.__main__ import main

class LosingDaemon(daemon.Daemon):
    def serve(self, open_devices):
        super().serve(open_devices)
        # an illegal address breaks the process's hold on the card for good
        kernel = cupy.RawKernel('extern "C" __global__ void k(int *p) { *p = 1; }', "k")
        kernel((1,), (1,), (cupy.int64(16),))
        faulthandler.dump_traceback_later(60)  # where it hangs, if it does

daemon.Daemon = LosingDaemon
main()
"""


def test_a_lost_card_ends_the_process_with_its_own_exit_code(tmp_path: Path) -> None:
    target = f"unix:{tmp_path}/deconvd.sock"
    log = (
        tmp_path / "log"
    )  # a file takes all that a server says, as a pipe that nobody reads does not
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", _LOSING_SERVER, "--device", "cuda:0", "--listen", target],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        assert "listening" in process.stdout.readline()
        try:
            with (
                deconvd_client.connect(target, timeout_s=30) as F,
                pytest.raises(deconvd_client.DeconvdError),
            ):
                F.deconvolution_2d(X, W)
            exit_code = process.wait(60)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the server has not ended:\n{log.read_text()}")
        finally:
            process.kill()

    assert exit_code == 3
    assert "a device is lost" in log.read_text()


def test_the_ledger_tells_the_stages_apart(server: ServerProcess) -> None:
    with deconvd_client.connect(server.target) as F:
        for x in (X, np.ones((64, 8, 128, 128), np.float32)):
            F.deconvolution_2d(x, W)
            assert {"queue_us", "upload_us", "compute_us", "download_us"} <= set(F.last_ledger)
