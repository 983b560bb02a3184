"""TCP that is slow, split in odd places, held up, cut or lossy: results are right, or the error says what to do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import deconvd_client
from deconvd.model.dtypes import Array
from deconvd_client import Connection, DeadlineError, UnavailableError
from deconvd_client.transports.backoff import Backoff
from deconvd_client.transports.direct import pool
from tests.fault_proxy import (
    CLEAN,
    Direction,
    Fault,
    FaultProxy,
    LinkConditions,
    faulty_proxy,
    unresponsive_server,
)
from tests.processes import process_resources, wait_until
from tests.servers import ServerProcess, server_process

rng = np.random.default_rng(0)
SMALL = rng.integers(-3, 4, (2, 2, 100, 100)).astype(np.float32)  # goes in one message
LARGE = rng.integers(-3, 4, (16, 2, 256, 256)).astype(np.float32)  # in a stream
SIZES = pytest.mark.parametrize("x", [SMALL, LARGE], ids=["message", "stream"])
WAYS = pytest.mark.parametrize("way", Direction, ids=lambda way: way.name.lower())
CUTS = pytest.mark.parametrize("fault", [Fault.RESET, Fault.CLOSE], ids=lambda fault: fault.value)
PARTS = pytest.mark.parametrize("part", [0.0, 1e-4, 0.5, 0.9999], ids=lambda part: f"at-{part}")
TWICE = 2 * np.eye(2, dtype=np.float32)[:, :, None, None]
STREAMS_COUNT = 8
"""As many as the server lets run and wait: fewer than usual, so that fewer faults would show what each leaves."""


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    constants = {
        "deconvd_server.backend:STREAMS_COUNT": STREAMS_COUNT // 2,
        "deconvd_server.backend:_WAITING_STREAMS_COUNT": STREAMS_COUNT // 2,
    }
    with server_process(directory, listen=("127.0.0.1:0",), constants=constants) as server:
        yield server


def connected(target: str, timeout_s: float = 60.0, *, fail_fast: bool = False) -> Connection:
    return deconvd_client.connect(
        target, timeout_s=timeout_s, transport="grpc", fail_fast=fail_fast
    )


@contextmanager
def directly_connected(
    server: ServerProcess, *lines: LinkConditions, timeout_s: float = 60.0
) -> Iterator[tuple[FaultProxy, Connection]]:
    """Give a connection whose direct calls go over bad lines, and what goes by gRPC over a clean one."""
    host, _, _ = server.target.rpartition(":")
    other_host = "127.0.0.2"  # where the port for direct calls is free for a proxy
    with connected(server.target) as F:
        port = F.server_info().direct_port
    with (
        faulty_proxy(server.target, CLEAN, host=other_host) as clean,
        faulty_proxy(f"{host}:{port}", *lines, host=other_host, own_port=port) as bad,
        deconvd_client.connect(clean.target, timeout_s=timeout_s, transport="tcp") as F,
    ):
        yield bad, F


def assert_right(F: Connection, x: Array) -> None:
    np.testing.assert_array_equal(F.deconvolution_2d(x, TWICE), 2 * x)


UNEVEN = pytest.mark.parametrize(
    "line",
    [
        LinkConditions(pieces=(1, 7, 4093, 13, 65521, 9)),  # where frames and messages are cut, too
        LinkConditions(pieces=(100_000,), pause_s=0.005),  # 20 MB/s
        LinkConditions(fault=Fault.HANG, after_bytes=50_000, hang_s=0.5),
        LinkConditions(fault=Fault.HANG, after_bytes=50_000, hang_s=0.5, direction=Direction.DOWN),
    ],
    ids=["split", "slow", "hung-up", "hung-down"],
)


@UNEVEN
@SIZES
def test_a_slow_and_uneven_line_changes_nothing(
    tcp_server: ServerProcess, line: LinkConditions, x: Array
) -> None:
    with faulty_proxy(tcp_server.target, line) as proxy, connected(proxy.target) as F:
        assert_all_right(F, x)


@UNEVEN
@SIZES
def test_a_slow_and_uneven_line_changes_no_direct_call(
    tcp_server: ServerProcess, line: LinkConditions, x: Array
) -> None:
    with directly_connected(tcp_server, line) as (_, F):
        wait_until_direct(F)
        assert_all_right(F, x)


def wait_until_direct(F: Connection) -> None:
    """Call until there is a line that has greeted the server: calls do not wait for one."""

    def has_line() -> bool:
        assert_right(F, SMALL[:, :, :2, :2])
        return "1 direct connection" in repr(F)

    wait_until(has_line)


def assert_all_right(F: Connection, x: Array) -> None:
    """See that y and the gradients are right."""
    assert_right(F, x)
    gx, gW, gb = F.deconvolution_2d_grad(x, TWICE, np.zeros(2, np.float32), x)
    flat = x.astype(np.float64).transpose(1, 0, 2, 3).reshape(2, -1)
    np.testing.assert_array_equal(gx, 2 * x)
    np.testing.assert_array_equal(gW, (flat @ flat.T)[:, :, None, None])
    np.testing.assert_array_equal(gb, flat.sum(axis=1))


@CUTS
@WAYS
@SIZES
@PARTS
def test_a_call_that_is_cut_is_made_again(
    tcp_server: ServerProcess, x: Array, way: Direction, fault: Fault, part: float
) -> None:
    cut = LinkConditions(fault=fault, direction=way, after_bytes=round(part * x.nbytes))
    with faulty_proxy(tcp_server.target, cut, CLEAN) as proxy, connected(proxy.target) as F:
        assert_right(F, x)

    assert proxy.faults_count == 1


@CUTS
@WAYS
@SIZES
@PARTS
def test_a_direct_call_that_is_cut_is_made_again(
    tcp_server: ServerProcess,
    monkeypatch: pytest.MonkeyPatch,
    x: Array,
    way: Direction,
    fault: Fault,
    part: float,
) -> None:
    monkeypatch.setattr(pool, "Backoff", partial(Backoff, 0.1))  # after a line cut in its greeting
    cut = LinkConditions(fault=fault, direction=way, after_bytes=round(part * x.nbytes))
    with directly_connected(tcp_server, cut, CLEAN) as (proxy, F):

        def is_cut() -> bool:
            assert_right(F, x)
            return proxy.faults_count == 1

        wait_until(is_cut)
        wait_until_direct(F)


@WAYS
@SIZES
def test_a_line_that_hangs_ends_a_direct_call_at_its_deadline(
    tcp_server: ServerProcess, x: Array, way: Direction
) -> None:
    hung = LinkConditions(fault=Fault.HANG, direction=way, after_bytes=x.nbytes // 2)
    with directly_connected(tcp_server, hung, timeout_s=1.0) as (proxy, F):
        wait_until_direct(F)
        with pytest.raises(DeadlineError):
            F.deconvolution_2d(x, TWICE)

    assert proxy.faults_count == 1


@SIZES
def test_a_line_that_is_always_cut_is_said_to_be_unavailable(
    tcp_server: ServerProcess, x: Array
) -> None:
    cut = LinkConditions(fault=Fault.RESET, after_bytes=x.nbytes // 2)
    with faulty_proxy(tcp_server.target, cut) as proxy, connected(proxy.target, timeout_s=3) as F:
        with pytest.raises(UnavailableError):
            F.deconvolution_2d(x, TWICE)

    assert proxy.faults_count > 1


@WAYS
@SIZES
def test_a_line_that_hangs_ends_a_call_at_its_deadline(
    tcp_server: ServerProcess, x: Array, way: Direction
) -> None:
    hung = LinkConditions(fault=Fault.HANG, direction=way, after_bytes=x.nbytes // 2)
    with (
        faulty_proxy(tcp_server.target, hung) as proxy,
        connected(proxy.target, timeout_s=1.0) as F,
    ):
        with pytest.raises(DeadlineError):
            F.deconvolution_2d(x, TWICE)

    assert proxy.faults_count == 1


def test_a_connection_is_closed_although_its_server_takes_nothing() -> None:
    with unresponsive_server() as target, connected(target, timeout_s=1.0) as F:
        with pytest.raises(DeadlineError):
            F.deconvolution_2d(LARGE, TWICE)


def test_a_connection_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deconvd_client.transports.grpc.channel._TCP_USER_TIMEOUT_S", 1)
    with unresponsive_server() as target, connected(target) as F:
        with pytest.raises(UnavailableError):
            F.deconvolution_2d(LARGE, TWICE)


def cuts_by(fault: Fault) -> list[LinkConditions]:
    """Return links that have a fault at five places of a large call, in each direction."""
    return [
        LinkConditions(fault=fault, direction=way, after_bytes=part * LARGE.nbytes // 7)
        for way in Direction
        for part in range(1, 6)
    ]


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_cut_calls_leave_nothing_on_the_server(tcp_server: ServerProcess, fault: Fault) -> None:
    pid = tcp_server.process.pid
    with connected(tcp_server.target) as F:
        assert_right(F, LARGE)
        before = process_resources(pid)
        cuts = cuts_by(fault)
        timeout_s = 0.5 if fault is Fault.HANG else 10.0
        with faulty_proxy(tcp_server.target, *cuts) as proxy:
            while proxy.faults_count <= max(STREAMS_COUNT, len(cuts)):
                with connected(proxy.target, timeout_s=timeout_s, fail_fast=True) as hasty:
                    with suppress(UnavailableError, DeadlineError):
                        hasty.deconvolution_2d(LARGE, TWICE)

        wait_until(lambda: process_resources(pid).descriptors_count <= before.descriptors_count)
        assert_idle(F)


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.value)
def test_direct_calls_that_are_cut_leave_nothing_on_the_server(
    tcp_server: ServerProcess, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(pool, "Backoff", partial(Backoff, 0.1))  # after a line cut in its greeting
    pid = tcp_server.process.pid
    with connected(tcp_server.target) as F:
        assert_right(F, LARGE)
        before = process_resources(pid)
        cuts = cuts_by(fault)
        # a call that ends at its deadline may not have come as far as the fault
        timeout_s = 1.0 if fault is Fault.HANG else 10.0
        with directly_connected(tcp_server, *cuts, timeout_s=timeout_s) as (proxy, hasty):
            with ThreadPoolExecutor(4) as threads:
                enough_count = max(STREAMS_COUNT, len(cuts))
                calling = [
                    threads.submit(call_until_faults, proxy, hasty, enough_count) for _ in range(4)
                ]
                for each in calling:
                    each.result()

        wait_until(lambda: process_resources(pid).descriptors_count <= before.descriptors_count)
        assert_idle(F)


def call_until_faults(proxy: FaultProxy, F: Connection, count: int) -> None:
    """Call until more than `count` lines were bad."""
    while proxy.faults_count <= count:
        with suppress(UnavailableError, DeadlineError):
            F.deconvolution_2d(LARGE, TWICE)


def assert_idle(F: Connection) -> None:
    """See that the server has nothing left of the calls, and serves."""
    (device,) = F.server_info().devices
    assert (device.running_calls_count, device.waiting_calls_count) == (0, 0)
    assert device.used_bytes == 0
    assert_right(F, LARGE)


LOSSY_NAMESPACE = """
set -e
ip link set lo mtu 1500 up
tc qdisc add dev lo root tbf rate 400mbit burst 64k latency 400ms
nft add table inet lossy
nft add chain inet lossy input '{ type filter hook input priority 0; }'
nft add rule inet lossy input numgen random mod 100 '<' 2 drop
exec "$@"
"""

CALLS = """
import sys
from pathlib import Path
import pytest
from deconvd.direct.events import StripedCallHead
from tests.servers import server_process
from tests.striped_clients import force_stripes, wait_until_direct, watch_heads
import deconvd_client
from tests.test_bad_lines import LARGE, SMALL, assert_right
monkeypatch = pytest.MonkeyPatch()
heads = watch_heads(monkeypatch)
with server_process(Path(sys.argv[1]), listen=("127.0.0.1:0",)) as server:
    for transport, stripes_count in (("grpc", 0), ("tcp", 0), ("tcp", 2), ("tcp", 4)):
        force_stripes(monkeypatch, stripes_count)
        for x in (SMALL, LARGE, SMALL):
            with deconvd_client.connect(server.target, transport=transport) as F:
                if transport == "tcp":
                    wait_until_direct(F, heads)
                for _ in range(2):
                    assert_right(F, x)
                    is_striped = isinstance(heads[-1], StripedCallHead) if heads else False
                    assert is_striped == (stripes_count > 0), heads[-1:]
"""


def in_lossy_namespace(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command on a network of its own that drops every fiftieth packet."""
    return subprocess.run(
        ["unshare", "--net", "sh", "-c", LOSSY_NAMESPACE, "sh", *command],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.usefixtures(
    "unmeasured"
)  # one packet in fifty is lost: that is long enough without coverage
def test_a_network_that_loses_packets_changes_nothing(tmp_path: Path) -> None:
    try:
        possible = in_lossy_namespace("true")
    except FileNotFoundError as error:
        pytest.skip(f"no network namespaces here: {error}")
    if possible.returncode:
        pytest.skip(f"no lossy network may be made here: {possible.stderr.strip()}")

    ended = in_lossy_namespace(sys.executable, "-W", "error", "-c", CALLS, str(tmp_path))

    assert ended.returncode == 0, ended.stderr
