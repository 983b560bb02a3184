"""Metrics of a real server in another process: each number moves as calls are made, and each name is documented."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

import deconvd_client
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1.deconvd_pb2_grpc import DeconvolutionServiceStub
from deconvd.wire.tensor import message_from_array
from deconvd_client import ExhaustedError
from tests.client_command import deconvd
from tests.direct_calls import target_of
from tests.fault_proxy import Direction, Fault, LinkConditions, faulty_proxy
from tests.hung_device import HUNG_SAMPLES_COUNT, PRELUDE
from tests.processes import wait_until
from tests.scrapes import Scrape, metrics_address, scrape
from tests.servers import ServerProcess, server_process
from tests.striped_clients import LARGE, SMALL_PIECES, TWICE, force_stripes

pytestmark = pytest.mark.usefixtures("patient")

DOCUMENTATION = Path(__file__).parents[1] / "docs" / "metrics.md"
X = np.ones((1, 2, 64, 64), np.float32)  # enough for shared memory
W = np.ones((2, 3, 2, 2), np.float32)
Y_BYTES = 3 * 65 * 65 * 4
RESIDENT_BYTES = 1 << 20
TOO_LARGE = np.ones((2, 1, 512, 512), np.float32)
CALLS = "deconvd_calls_total"
RUNNING = "deconvd_calls_running"
STAGE = "deconvd_call_stage_seconds"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    directory = tmp_path_factory.mktemp("server")
    options = "--metrics-port", "0", "--resident-memory-bytes", str(RESIDENT_BYTES)
    listen = ("unix", "127.0.0.1:0")
    with server_process(directory, *options, listen=listen, constants=SMALL_PIECES) as running:
        yield running


@pytest.fixture(scope="module")
def address(server: ServerProcess) -> str:
    return metrics_address(server)


def settled(address: str) -> Scrape:
    """Return the metrics once no call is under way: a call ends after its last byte has left."""
    wait_until(lambda: not scrape(address).value(RUNNING))
    return scrape(address)


@pytest.mark.parametrize("transport", ["shared_memory", "unix", "tcp", "grpc"])
def test_calls_by_each_transport_are_counted_with_their_bytes_and_times(
    server: ServerProcess, address: str, transport: str
) -> None:
    with deconvd_client.connect(target_of(server, transport), transport=transport) as F:
        F.deconvolution_2d(X, W)
        before = settled(address)
        for _ in range(3):
            F.deconvolution_2d(X, W)
    after = settled(address)

    def grown(name: str, **labels: str) -> float:
        return after.value(name, **labels) - before.value(name, **labels)

    call = {"method": "Deconvolve", "transport": transport, "tenant": ""}
    assert grown(CALLS, **call, status="OK") == 3
    assert grown("deconvd_received_bytes_total", **call) == 3 * (X.nbytes + W.nbytes)
    assert grown("deconvd_sent_bytes_total", **call) == 3 * Y_BYTES
    for stage in ("queue", "compute", "server"):
        assert grown(f"{STAGE}_count", stage=stage) == 3
        assert grown(f"{STAGE}_bucket", stage=stage, le="+Inf") == 3
    assert 0 < grown(f"{STAGE}_sum", stage="compute") < grown(f"{STAGE}_sum", stage="server")
    assert grown("deconvd_device_busy_seconds_total", device="cpu") > 0
    assert after.value("process_cpu_seconds_total") > 0


def test_the_buckets_of_a_stage_grow_with_their_bounds_to_all_calls(
    server: ServerProcess, address: str
) -> None:
    with deconvd_client.connect(server.target) as F:
        F.deconvolution_2d(X, W)

    (family,) = (each for each in settled(address).families if each.name == STAGE)
    stages = {sample.labels["stage"] for sample in family.samples}
    assert stages >= {"queue", "compute", "server"}
    for stage in stages:
        own = [each for each in family.samples if each.labels["stage"] == stage]
        bounds = [float(each.labels["le"]) for each in own if each.name.endswith("bucket")]
        counts = [each.value for each in own if each.name.endswith("bucket")]
        (count,) = (each.value for each in own if each.name.endswith("count"))
        assert bounds == [*(2**bits / 1e6 for bits in range(6, 25)), math.inf]
        assert counts == sorted(counts)
        assert counts[-1] == count


def test_calls_that_fail_are_counted_by_their_status(server: ServerProcess, address: str) -> None:
    before = settled(address)
    hung = LinkConditions(fault=Fault.HANG, direction=Direction.DOWN, after_bytes=LARGE.nbytes // 4)

    with grpc.insecure_channel(server.targets[1]) as channel:
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            DeconvolutionServiceStub(channel).Deconvolve(pb.DeconvolveRequest())
    with deconvd_client.connect(server.target, transport="unix") as F:
        with pytest.raises(ExhaustedError):
            F.put(TOO_LARGE)
    with (
        faulty_proxy(server.targets[1], hung) as proxy,
        deconvd_client.connect(proxy.target, transport="grpc") as F,
    ):
        future = F.submit(F.deconvolution_2d, LARGE, TWICE)
        wait_until(lambda: proxy.faults_count > 0)
        during = scrape(address)
        future.cancel()
    after = settled(address)

    stream = {"method": "DeconvolveStream", "transport": "grpc"}
    assert during.value(RUNNING, **stream) == 1
    assert during.value("deconvd_streams", state="running") == 1
    sent = "deconvd_sent_bytes_total"
    assert LARGE.nbytes // 4 <= during.value(sent, **stream) - before.value(sent, **stream)
    invalid = {"method": "Deconvolve", "transport": "grpc", "status": "INVALID_ARGUMENT"}
    assert after.value(CALLS, **invalid) - before.value(CALLS, **invalid) == 1
    exhausted = {"method": "PutTensor", "transport": "unix", "status": "RESOURCE_EXHAUSTED"}
    assert after.value(CALLS, **exhausted) > before.value(CALLS, **exhausted)
    cancelled = {**stream, "status": "CANCELLED"}
    assert after.value(CALLS, **cancelled) - before.value(CALLS, **cancelled) == 1
    assert after.value("deconvd_streams") == 0


def test_a_stream_is_one_call_with_all_its_bytes(
    server: ServerProcess, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_stripes(monkeypatch, 0)
    before = settled(address)

    with deconvd_client.connect(server.targets[1], transport="tcp") as F:
        F.deconvolution_2d(LARGE, TWICE)

    after = settled(address)
    call = {"method": "DeconvolveStream", "transport": "tcp"}
    assert after.value(CALLS, **call) - before.value(CALLS, **call) == 1
    received = "deconvd_received_bytes_total"
    assert after.value(received, **call) - before.value(received, **call) == (
        LARGE.nbytes + TWICE.nbytes
    )


def test_residents_are_counted_for_all_tenants_together(
    server: ServerProcess, address: str
) -> None:
    cache = {"device": "cpu", "cache": "resident tensors"}
    entries = "deconvd_cache_entries"

    def is_empty() -> bool:  # a server notices the end of a session after its client does
        scraped = scrape(address)
        return not scraped.value("deconvd_sessions") and not scraped.value(entries, **cache)

    wait_until(is_empty)
    before = scrape(address)
    image = np.ones((1, 1, 256, 256), np.float32)  # a quarter of what residents may take

    with (
        deconvd_client.connect(server.target) as F,
        deconvd_client.connect(server.target) as G,
    ):
        kept = [F.put(image), G.put(image)]
        for connection, tensor in zip((F, G), kept, strict=True):
            connection.deconvolution_2d(tensor, np.ones((1, 1, 1, 1), np.float32))
        held = scrape(address)
        kept += [F.put(image) for _ in range(5)]
        full = scrape(address)
    wait_until(is_empty)

    assert held.value("deconvd_sessions") == 2
    assert held.value(entries, **cache) == 2
    assert 2 * image.nbytes <= held.value("deconvd_cache_bytes", **cache) < 3 * image.nbytes
    assert held.value("deconvd_cache_limit_bytes", **cache) == RESIDENT_BYTES
    reserved = held.value("deconvd_device_memory_bytes", use="reserved")
    assert reserved >= 2 * image.nbytes
    hits = "deconvd_cache_hits_total"
    assert held.value(hits, **cache) - before.value(hits, **cache) == 2
    evictions = "deconvd_cache_evictions_total"
    evicted = full.value(evictions, **cache) - held.value(evictions, **cache)
    assert evicted == 7 - full.value(entries, **cache) > 0


def test_what_is_in_use_is_told(server: ServerProcess, address: str) -> None:
    with deconvd_client.connect(server.target, transport="shared_memory") as F:

        def is_direct() -> bool:  # on a busy machine the first calls may go by gRPC
            F.deconvolution_2d(X, W)
            scraped = scrape(address)
            names = ("deconvd_direct_connections", "deconvd_borrowers")
            return [scraped.value(name) for name in names] == [1, 1]

        wait_until(is_direct)
        used = scrape(address)

    kinds = {"messages", "streams", "pools", "shared memory", "process"}
    assert used.label_values("deconvd_memory_bytes", "kind") == kinds
    for kind in kinds:
        bound = used.value("deconvd_memory_limit_bytes", kind=kind)
        assert used.value("deconvd_memory_bytes", kind=kind) <= bound
    assert used.value("deconvd_memory_bytes", kind="shared memory") >= X.nbytes
    assert used.value("deconvd_borrowers") == 1
    assert used.value("process_open_fds") > 10


def test_status_shows_the_same_numbers(server: ServerProcess, address: str, tmp_path: Path) -> None:
    with deconvd_client.connect(server.target, transport="unix") as F:
        F.deconvolution_2d(X, W)
    scraped = settled(address)

    shown = json.loads(deconvd("status", "--json", "--target", server.target, cwd=tmp_path).stdout)

    # the command itself has called GetServerInfo meanwhile
    methods = [each for each in shown["counts"]["methods"] if each["method"] == "Deconvolve"]
    assert methods
    for counts in methods:
        call = {"method": counts["method"], "transport": counts["transport"]}
        for status, count in counts["ended"].items():
            assert scraped.value(CALLS, **call, status=status) == count
        assert scraped.value("deconvd_received_bytes_total", **call) == counts["received_bytes"]
        assert scraped.value("deconvd_sent_bytes_total", **call) == counts["sent_bytes"]
    for times in shown["counts"]["stages"]:
        assert scraped.value(f"{STAGE}_count", stage=times["stage"]) == times["count"]
        assert scraped.value(f"{STAGE}_sum", stage=times["stage"]) == times["total_us"] / 1e6
    (device,) = shown["devices"]
    assert scraped.value("deconvd_device_memory_limit_bytes") == device["budget_bytes"]
    assert scraped.value("deconvd_device_busy_seconds_total") == device["busy_us"] / 1e6


def test_the_documentation_lists_each_metric_and_no_other(
    server: ServerProcess, address: str
) -> None:
    with deconvd_client.connect(server.target) as F:
        F.deconvolution_2d(X, W)  # no call has no labels
    documented = re.findall(
        r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.*) \|$", DOCUMENTATION.read_text(), re.MULTILINE
    )

    served = [
        (
            family.name + "_total" * (family.type == "counter"),
            family.type,
            ", ".join(
                f"`{label}`"
                for label in dict.fromkeys(
                    name for sample in family.samples for name in sample.labels if name != "le"
                )
            ),
            family.documentation,
        )
        for family in scrape(address).families
        if family.name.startswith("deconvd_")
    ]
    assert sorted(documented) == sorted(served)


def test_both_formats_are_valid_and_may_be_compressed(address: str) -> None:
    openmetrics = "application/openmetrics-text; version=1.0.0"

    plain = scrape(address)
    packed = scrape(address, headers={"Accept": openmetrics, "Accept-Encoding": "gzip"})

    assert plain.headers["content-type"].startswith("text/plain; version=")
    assert packed.headers["content-type"].startswith("application/openmetrics-text; version=")
    assert packed.headers["content-encoding"] == "gzip"
    text = gzip.decompress(packed.body).decode()
    assert text.endswith("# EOF\n")
    names = {family.name for family in text_string_to_metric_families(text)}
    assert len(names) == len(plain.families)
    assert {"deconvd_calls", "deconvd_ready", "process_cpu_seconds", "python_info"} <= names


@pytest.mark.parametrize(
    ("accepted", "is_packed"),
    [
        ("gzip;q=0", False),
        ("identity, GZIP ; q=0.000", False),
        ("gzip;q=0.5, identity;q=0", True),
        ("deflate;q=0, gzip", True),
    ],
)
def test_they_are_compressed_only_for_a_scraper_that_does_not_refuse_it(
    address: str, accepted: str, is_packed: bool
) -> None:
    answer = scrape(address, headers={"Accept-Encoding": accepted})

    assert answer.headers.get("content-encoding") == ("gzip" if is_packed else None)


def test_they_are_told_while_calls_wait_for_a_device_that_hangs(socket_directory: Path) -> None:
    hung = np.ones((HUNG_SAMPLES_COUNT, 1, 8, 8), np.float32)
    w = np.ones((1, 1, 2, 2), np.float32)
    calls_count = 8
    with (
        server_process(
            socket_directory, "--metrics-port", "0", "--drain-timeout-s", "0", prelude=PRELUDE
        ) as server,
        deconvd_client.connect(server.target, transport="grpc") as F,
    ):
        address = metrics_address(server)
        futures = [F.submit(F.deconvolution_2d, hung, w) for _ in range(calls_count)]

        def has_come() -> bool:
            return scrape(address).value(RUNNING, method="Deconvolve") == calls_count

        wait_until(has_come)
        wait_until(lambda: scrape(address).value("deconvd_device_wait_seconds") > 0)
        scraped = scrape(address)
        for future in futures:
            future.cancel()

    running_count = scraped.value("deconvd_device_calls", device="cpu", state="running")
    assert running_count > 0
    assert scraped.value("deconvd_device_calls", state="waiting") == calls_count - running_count
    assert scraped.value("deconvd_device_memory_bytes", use="calls") > 0
    assert scraped.value("deconvd_ready") == 1


def test_refused_calls_are_told_by_their_reason(socket_directory: Path) -> None:
    hung = np.ones((HUNG_SAMPLES_COUNT, 1, 8, 8), np.float32)
    w = np.ones((1, 1, 2, 2), np.float32)
    request = pb.DeconvolveRequest(x=message_from_array(hung), w=message_from_array(w))
    name, refused = "deconvd_refused_calls_total", "UNAVAILABLE"
    with (
        server_process(
            socket_directory,
            *("--metrics-port", "0", "--drain-timeout-s", "0"),
            prelude=PRELUDE,
            constants={"deconvd_server.backend:_WAITING_CALLS_COUNT": 2},
        ) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        address = metrics_address(server)
        stub = DeconvolutionServiceStub(channel)
        calls = [stub.Deconvolve.future(request) for _ in range(8)]

        def is_full() -> bool:
            scraped = scrape(address)
            ended = scraped.value(CALLS, method="Deconvolve", status=refused)
            return ended + scraped.value(RUNNING, method="Deconvolve") == len(calls) and ended > 0

        wait_until(is_full)
        scraped = scrape(address)
        for call in calls:
            call.cancel()

    reasons = {"places", "bytes", "time", "residents"}
    assert scraped.label_values(name, "reason") == reasons
    assert scraped.value(name, device="cpu") == scraped.value(CALLS, status=refused)
    assert scraped.value(name, reason="residents") == 0
    assert scraped.value("deconvd_queue_wait_seconds", device="cpu") >= 0
