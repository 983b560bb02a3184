"""A collector of spans: it receives what exporters of OpenTelemetry send by OTLP over gRPC, as a real one does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from sys import executable
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.processes import wait_until

__all__ = ["Collector", "Instrumented", "attributes_of", "running_collector"]

_EXPORT = "opentelemetry.proto.collector.trace.v1.TraceService"


class Collector:
    """The spans that have come.

    Attributes:
        environment: Variables with which a process that `Instrumented` runs sends its spans here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self.environment: dict[str, str] = {}

    def export(self, request: ExportTraceServiceRequest, _context: object) -> object:
        """Serve the method of OTLP."""
        with self._lock:
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    self._spans.extend(scope.spans)
        return ExportTraceServiceResponse()

    def spans(self, wanted: Callable[[Span], bool]) -> list[Span]:
        """Return the spans of one kind that have come so far."""
        with self._lock:
            return list(filter(wanted, self._spans))

    def wait_for(self, wanted: Callable[[Span], bool], count: int = 1) -> list[Span]:
        """Return the spans of one kind once that many have come."""
        wait_until(lambda: len(self.spans(wanted)) >= count)
        found = self.spans(wanted)
        assert len(found) == count
        return found


class Instrumented:
    """What a process is run in so that OpenTelemetry is set up before it: the command `opentelemetry-instrument`."""

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command that runs another one within, under the same process id."""
        return [str(Path(executable).with_name("opentelemetry-instrument")), *words]


@contextmanager
def running_collector() -> Iterator[Collector]:
    """Run a collector for the block."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(
        collector.export,
        request_deserializer=ExportTraceServiceRequest.FromString,
        response_serializer=ExportTraceServiceResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_EXPORT, {"Export": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    collector.environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_LOGS_EXPORTER": "none",
        "OTEL_METRICS_EXPORTER": "none",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
    }
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()


def attributes_of(span: Span) -> dict[str, Any]:
    """Return a span's attributes as Python's values."""
    return {pair.key: _value_of(pair.value) for pair in span.attributes}


def _value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value_of(item) for item in value.array_value.values]
    return getattr(value, kind)
