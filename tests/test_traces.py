"""Traces: a span for each call in the client, with the server's span as its child, whichever way the call goes.

The server is a process that `opentelemetry-instrument` runs. It exports its spans to a collector of the tests.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode

import deconvd_client
import deconvd_client.aio
from deconvd.direct.events import StripedCallHead
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.v1.deconvd_pb2_grpc import DeconvolutionServiceStub
from deconvd.wire.tensor import message_from_array
from deconvd_client import ExhaustedError
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.transport import NotServedDirectlyError
from deconvd_client.transports.direct.pool import DirectTransport
from tests.processes import wait_until
from tests.servers import ServerProcess, server_process, stop_server
from tests.span_recorder import SpanRecorder
from tests.striped_clients import LARGE, TWICE, force_stripes, watch_heads
from tests.trace_collector import Collector, Instrumented, attributes_of, running_collector

X = np.ones((1, 8, 32, 32), np.float32)
W = np.ones((8, 4, 4, 4), np.float32)
HUGE = np.broadcast_to(np.float32(0), (1, 1, 1 << 12, 1 << 12))
"""An x of 64 MiB, which the server is too small for."""

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"

UNIX, TCP = 0, 1


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with running_collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced_server(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    with server_process(
        tmp_path_factory.mktemp("server"),
        *("--access-log", "--device-memory-bytes", "48Mi"),
        listen=("unix", "127.0.0.1:0"),
        within=Instrumented(),
        environment=collector.environment,
    ) as server:
        yield server


@pytest.fixture
def patient_for_connections(patient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have first calls wait for direct connections, too."""
    monkeypatch.setattr("deconvd_client.transports.direct.pool._CONNECT_PATIENCE_S", 30.0)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SpanRecorder:
    recorder = SpanRecorder()
    recorder.install(monkeypatch)
    return recorder


class Beginnings(SpanProcessor):
    """The spans of calls that have begun."""

    def __init__(self) -> None:
        self.spans: list[SdkSpan] = []

    def on_start(self, span: SdkSpan, parent_context: object = None) -> None:
        if "/" in span.name:
            self.spans.append(span)


def id_of(span: ReadableSpan) -> bytes:
    span_id: int = span.context.span_id
    return span_id.to_bytes(8)


def is_child_of(parent: ReadableSpan) -> Callable[[Span], bool]:
    return lambda span: span.parent_span_id == id_of(parent)


def has_request_id(request_id: str) -> Callable[[Span], bool]:
    return lambda span: attributes_of(span).get("deconvd.request_id") == request_id


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def call_in_parts(F: deconvd_client.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deconvd_client.dispatch._MAX_BRIEF_BYTES", 0)
    monkeypatch.setattr("deconvd_client.dispatch._MAX_UNARY_BYTES", 0)
    force_stripes(monkeypatch, 0)
    F.deconvolution_2d(X, W)


def call_in_stripes(F: deconvd_client.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    force_stripes(monkeypatch, 2)
    heads = watch_heads(monkeypatch)
    F.deconvolution_2d(LARGE[:8], TWICE)
    assert [type(head) for head in heads] == [StripedCallHead]


@pytest.mark.usefixtures("patient_for_connections")
@pytest.mark.parametrize(
    ("transport", "way", "method"),
    [
        ("grpc", "grpc", "Deconvolve"),
        ("grpc", "parts", "DeconvolveStream"),
        ("tcp", "tcp", "Deconvolve"),
        ("tcp", "parts", "DeconvolveStream"),
        ("tcp", "stripes", "Deconvolve"),
        ("unix", "unix", "Deconvolve"),
        ("unix", "stripes", "Deconvolve"),
        ("shared_memory", "shared_memory", "Deconvolve"),
    ],
)
def test_the_servers_span_is_the_child_of_the_clients(
    transport: str,
    way: str,
    method: str,
    traced_server: ServerProcess,
    collector: Collector,
    recorder: SpanRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = traced_server.targets[TCP if transport in ("tcp", "grpc") else UNIX]
    with deconvd_client.connect(target, transport=transport) as F:
        with recorder.tracer.start_as_current_span("of the program") as own:
            if way == "parts":
                call_in_parts(F, monkeypatch)
            elif way == "stripes":
                call_in_stripes(F, monkeypatch)
            else:
                F.deconvolution_2d(X, W)
        (client,) = recorder.calls()
        # before the connection is closed: a server may still be at the end of a call that the client has ended
        (server,) = collector.wait_for(is_child_of(client))

    assert client.name == "deconvd.v1.DeconvolutionService/Deconvolve"
    assert client.kind is SpanKind.CLIENT
    assert client.parent is not None
    assert client.parent.span_id == own.get_span_context().span_id
    assert server.name == f"deconvd.v1.DeconvolutionService/{method}"
    assert server.kind == Span.SPAN_KIND_SERVER
    assert server.trace_id == client.context.trace_id.to_bytes(16)
    assert client.start_time is not None
    assert client.start_time <= server.start_time_unix_nano
    asked, answered = attributes(client), attributes_of(server)
    for found in (asked, answered):
        assert found["rpc.system"] == "grpc"
        assert found["rpc.service"] == "deconvd.v1.DeconvolutionService"
        assert found["rpc.grpc.status_code"] == 0
        assert found["deconvd.transport"] == transport
        assert found["deconvd.x.dtype"] == "float32"
        assert found["deconvd.compute_us"] > 0
    assert (asked["rpc.method"], answered["rpc.method"]) == ("Deconvolve", method)
    assert [*asked["deconvd.x.shape"]] == answered["deconvd.x.shape"]
    assert asked["deconvd.sent_bytes"] == answered["deconvd.received_bytes"] > 0
    assert asked["deconvd.received_bytes"] == answered["deconvd.sent_bytes"] > 0
    if target.startswith("unix:"):
        assert asked["server.address"] == target.removeprefix("unix:")
    else:
        assert f"{asked['server.address']}:{asked['server.port']}" == target


def test_tensors_that_are_put_and_fetched_have_spans(
    traced_server: ServerProcess, collector: Collector, recorder: SpanRecorder
) -> None:
    with deconvd_client.connect(traced_server.target) as F, F.put(X) as there:
        F.remote.deconvolution_2d(there, W).numpy()

    for client in recorder.calls():
        collector.wait_for(is_child_of(client))
    names = [span.name.rpartition("/")[2] for span in recorder.calls()]
    assert names == ["PutTensor", "Deconvolve", "GetTensor"]
    put, _, get = map(attributes, recorder.calls())
    assert put["deconvd.tensor.shape"] == X.shape
    assert put["deconvd.sent_bytes"] == X.nbytes
    assert get["deconvd.received_bytes"] > 0


@pytest.mark.parametrize("transport", ["grpc", "unix"])
def test_an_error_is_in_both_spans(
    transport: str, traced_server: ServerProcess, collector: Collector, recorder: SpanRecorder
) -> None:
    with (
        deconvd_client.connect(traced_server.target, transport=transport) as F,
        pytest.raises(ExhaustedError) as raised,
    ):
        F.deconvolution_2d(HUGE, W[:1])

    (client,) = recorder.calls()
    (server,) = collector.wait_for(is_child_of(client))
    assert client.status.status_code is StatusCode.ERROR
    assert "exception" in [event.name for event in client.events]
    found = attributes(client)
    assert found["deconvd.request_id"] == raised.value.request_id
    assert found["deconvd.transport"] == transport
    for told in (found, attributes_of(server)):
        assert told["rpc.grpc.status_code"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert told["error.type"] == "RESOURCE_EXHAUSTED"
    # by the conventions, an error of the server is one that its caller has not caused
    assert server.status.code == Status.STATUS_CODE_UNSET


def test_an_unforeseen_error_of_the_server_is_in_its_span(
    collector: Collector, recorder: SpanRecorder, tmp_path: Path
) -> None:
    prelude = (
        "from deconvd_server.device.cpu import CpuDevice\n"
        "def fail(*_, **__): raise ZeroDivisionError('of the test')\n"
        "CpuDevice.run = fail\n"
    )
    with (
        server_process(
            tmp_path, prelude=prelude, within=Instrumented(), environment=collector.environment
        ) as server,
        deconvd_client.connect(server.target) as F,
    ):
        with pytest.raises(deconvd_client.InternalError):
            F.deconvolution_2d(X, W)
        (client,) = recorder.calls()
        (span,) = collector.wait_for(is_child_of(client))

    assert span.status.code == Status.STATUS_CODE_ERROR
    (event,) = span.events
    assert {pair.key: pair.value.string_value for pair in event.attributes}[
        "exception.type"
    ] == "ZeroDivisionError"


def test_retries_are_events_of_one_span(recorder: SpanRecorder, tmp_path: Path) -> None:
    with server_process(tmp_path) as first:
        F = deconvd_client.connect(first.target)
        F.deconvolution_2d(X, W)
        assert first.end() == 0
    beginnings = Beginnings()
    recorder.provider.add_span_processor(beginnings)
    with F:
        future = F.submit(F.deconvolution_2d, X, W)
        wait_until(lambda: any(span.events for span in beginnings.spans))
        with server_process(tmp_path):
            future.result()

    _, retried = recorder.calls()
    events = [event.name for event in retried.events]
    assert events
    assert set(events) == {"retry"}
    assert retried.status.status_code is StatusCode.UNSET


@pytest.mark.usefixtures("patient_for_connections")
def test_the_last_way_of_a_call_counts(
    traced_server: ServerProcess,
    collector: Collector,
    recorder: SpanRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lose(
        transport: DirectTransport, _method: str, _request: bytes, deadline: Deadline, *_: Any
    ) -> Any:
        with transport.pooled_connection(deadline):
            raise NotServedDirectlyError

    with deconvd_client.connect(traced_server.target, transport="unix") as F:
        F.deconvolution_2d(X, W)
        monkeypatch.setattr(DirectTransport, "unary", lose)
        F.deconvolution_2d(X, W)

    ways = [attributes(span)["deconvd.transport"] for span in recorder.calls()]
    assert ways == ["unix", "grpc"]
    (server,) = collector.wait_for(is_child_of(recorder.calls()[-1]))
    assert attributes_of(server)["deconvd.transport"] == "grpc"


def test_tasks_and_threads_have_their_own_parents(
    traced_server: ServerProcess, collector: Collector, recorder: SpanRecorder
) -> None:
    async def call(F: deconvd_client.aio.AsyncConnection, name: str) -> None:
        with recorder.tracer.start_as_current_span(name):
            await F.deconvolution_2d(X, W)

    async def call_all() -> None:
        async with deconvd_client.aio.connect(traced_server.target) as F:
            await asyncio.gather(call(F, "one task"), call(F, "another task"))

    asyncio.run(call_all())
    with deconvd_client.connect(traced_server.target) as F:
        with recorder.tracer.start_as_current_span("a future"):
            future = F.submit(F.deconvolution_2d, X, W)
        future.result()

    parents = sorted(parent for _, parent in recorder.parents())
    assert parents == ["a future", "another task", "one task"]
    for span in recorder.calls():
        collector.wait_for(is_child_of(span))


def test_a_cancelled_task_is_an_error_of_its_span(recorder: SpanRecorder, tmp_path: Path) -> None:
    beginnings = Beginnings()
    recorder.provider.add_span_processor(beginnings)

    async def call_and_cancel(target: str) -> None:
        async with deconvd_client.aio.connect(target) as F:
            task = asyncio.create_task(F.deconvolution_2d(X, W))
            await asyncio.to_thread(wait_until, lambda: bool(beginnings.spans))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(wait_until, lambda: bool(recorder.calls()))

    with server_process(tmp_path) as server, stop_server(server):
        asyncio.run(call_and_cancel(server.target))

    (span,) = recorder.calls()
    assert span.status.status_code is StatusCode.ERROR
    assert attributes(span)["error.type"] == "CANCELLED"


def ask_by_grpc(server: ServerProcess, telemetry: pb.Telemetry, *metadata: tuple[str, str]) -> None:
    """Make a call as a stock client does."""
    request = pb.DeconvolveRequest(
        x=message_from_array(X), w=message_from_array(W), telemetry=telemetry
    )
    with grpc.insecure_channel(server.targets[TCP]) as channel:
        DeconvolutionServiceStub(channel).Deconvolve(request, metadata=metadata, timeout=30)


def test_metadata_of_grpc_may_name_the_parent(
    traced_server: ServerProcess, collector: Collector
) -> None:
    telemetry = pb.Telemetry(request_id="by metadata")

    ask_by_grpc(
        traced_server,
        telemetry,
        ("traceparent", TRACEPARENT),
        ("tracestate", "a=1"),
        ("tracestate", "b=2"),
    )

    (span,) = collector.wait_for(has_request_id("by metadata"))
    assert span.trace_id.hex() == TRACE_ID
    assert span.parent_span_id.hex() == PARENT_ID
    assert span.trace_state == "a=1,b=2"


def test_what_the_request_names_comes_first(
    traced_server: ServerProcess, collector: Collector
) -> None:
    telemetry = pb.Telemetry(request_id="by both", traceparent=TRACEPARENT)
    other = f"00-{32 * 'a'}-{16 * 'b'}-01"

    ask_by_grpc(traced_server, telemetry, ("traceparent", other), ("tracestate", "b=2"))

    (span,) = collector.wait_for(has_request_id("by both"))
    assert span.parent_span_id.hex() == PARENT_ID
    assert not span.trace_state


@pytest.mark.parametrize(
    "bad",
    [
        "garbage",
        TRACEPARENT.upper(),
        f"ff{TRACEPARENT[2:]}",
        f"{TRACEPARENT}-more",
        TRACEPARENT.replace(TRACE_ID, 32 * "0"),
        1000 * "0",
    ],
)
@pytest.mark.parametrize("place", ["request", "metadata"])
def test_a_bad_traceparent_is_ignored(
    bad: str, place: str, traced_server: ServerProcess, collector: Collector
) -> None:
    name = f"bad {hash(bad)} in {place}"
    telemetry = pb.Telemetry(request_id=name, tracestate="a=1")
    metadata = []
    if place == "request":
        telemetry.traceparent = bad
    else:
        metadata = [("traceparent", bad), ("tracestate", "a=1")]

    ask_by_grpc(traced_server, telemetry, *metadata)

    (span,) = collector.wait_for(has_request_id(name))
    assert not span.parent_span_id
    assert not span.trace_state


def test_a_long_tracestate_is_cut(traced_server: ServerProcess, collector: Collector) -> None:
    state = ",".join(f"vendor{i}={'x' * 54}" for i in range(30))
    telemetry = pb.Telemetry(request_id="long", traceparent=TRACEPARENT, tracestate=state)

    ask_by_grpc(traced_server, telemetry)

    (span,) = collector.wait_for(has_request_id("long"))
    assert span.trace_state == state[: 8 * 63 - 1]


def test_calls_that_are_not_sampled_are_not_recorded_on_the_server_either(
    traced_server: ServerProcess, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent, recorder = SpanRecorder(sampler=ALWAYS_OFF), SpanRecorder()
    with deconvd_client.connect(traced_server.target, transport="grpc") as F:
        for name, chosen in (("not sampled", silent), ("sampled", recorder)):
            chosen.install(monkeypatch)
            with F.using_request_id(name):
                F.deconvolution_2d(X, W)

    collector.wait_for(has_request_id("sampled"))
    assert not silent.exporter.get_finished_spans()
    assert not collector.spans(has_request_id("not sampled"))


def test_the_access_log_has_the_trace(traced_server: ServerProcess, recorder: SpanRecorder) -> None:
    with deconvd_client.connect(traced_server.target) as F:
        F.deconvolution_2d(X, W)

    (span,) = recorder.calls()
    trace_id = f"{span.context.trace_id:032x}"
    wait_until(lambda: f"(request -, trace {trace_id})" in traced_server.log.read_text())


def test_the_access_log_of_a_server_without_opentelemetry_has_it_too(
    recorder: SpanRecorder, tmp_path: Path
) -> None:
    with (
        server_process(tmp_path, "--access-log", "--log-format", "json") as server,
        deconvd_client.connect(server.target) as F,
    ):
        F.deconvolution_2d(X, W)
        (span,) = recorder.calls()
        entry = f'"trace_id": "{span.context.trace_id:032x}"'
        wait_until(lambda: entry in server.log.read_text())


def test_the_last_spans_arrive_when_the_server_ends(
    collector: Collector, recorder: SpanRecorder, tmp_path: Path
) -> None:
    environment = {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    with server_process(tmp_path, within=Instrumented(), environment=environment) as server:
        with deconvd_client.connect(server.target) as F:
            F.deconvolution_2d(X, W)
        (client,) = recorder.calls()
        assert not collector.spans(is_child_of(client))

        assert server.end() == 0

    assert len(collector.spans(is_child_of(client))) == 1


def test_a_collector_that_hangs_does_not_keep_the_server(
    recorder: SpanRecorder, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_LOGS_EXPORTER": "none",
        }
        options = ("--drain-timeout-s", "10")
        with server_process(
            tmp_path, *options, within=Instrumented(), environment=environment
        ) as server:
            with deconvd_client.connect(server.target) as F:
                F.deconvolution_2d(X, W)

            assert server.end() == 0


PROGRAM = """
import sys
import numpy as np
from opentelemetry import trace
import deconvd_client

X, W = np.ones((1, 8, 32, 32), np.float32), np.ones((8, 4, 4, 4), np.float32)
with deconvd_client.connect(sys.argv[1]) as F, F.using_request_id("of a program"):
    with trace.get_tracer("program").start_as_current_span("step"):
        F.deconvolution_2d(X, W)
"""


def test_a_program_of_a_user_exports_its_spans_to_the_same_collector(
    traced_server: ServerProcess, collector: Collector
) -> None:
    command = Instrumented().command([sys.executable, "-c", PROGRAM, traced_server.target])

    subprocess.run(command, check=True, env={**os.environ, **collector.environment})

    (server,) = collector.wait_for(has_request_id("of a program"))
    (client,) = collector.wait_for(lambda span: span.span_id == server.parent_span_id)
    (step,) = collector.wait_for(lambda span: span.span_id == client.parent_span_id)
    assert client.kind == Span.SPAN_KIND_CLIENT
    assert step.name == "step"
    assert server.trace_id == client.trace_id == step.trace_id


@pytest.mark.parametrize("uses_api", [False, True])
def test_no_more_of_opentelemetry_is_imported_than_a_program_imports_itself(
    uses_api: bool, server: ServerProcess
) -> None:
    program = PROGRAM.replace("of a program", "of another one")
    if not uses_api:
        program = program.replace("from opentelemetry import trace\n", "").replace(
            'trace.get_tracer("program").start_as_current_span("step")', "F"
        )
    absent = "opentelemetry.sdk" if uses_api else "opentelemetry"
    program += f"assert not [name for name in sys.modules if name.startswith({absent!r})]\n"

    subprocess.run([sys.executable, "-c", program, server.target], check=True)


def test_the_api_without_an_sdk_records_nothing(
    traced_server: ServerProcess, collector: Collector
) -> None:
    with (
        deconvd_client.connect(traced_server.target) as F,
        trace.get_tracer("the program").start_as_current_span("nothing"),
        F.using_request_id("no SDK"),
    ):
        F.deconvolution_2d(X, W)

    (server,) = collector.wait_for(has_request_id("no SDK"))
    assert not server.parent_span_id
