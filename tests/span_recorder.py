"""OpenTelemetry as a program sets it up, for the length of a test."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

__all__ = ["SpanRecorder"]


class SpanRecorder:
    """What this process records.

    Args:
        options: Options of OpenTelemetry's TracerProvider.
    """

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = self.provider.get_tracer("the program")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Record the spans of this process until the test ends, or another recorder is installed."""
        # `set_tracer_provider` works once in a process, and other tests want no provider
        monkeypatch.setattr("opentelemetry.trace._TRACER_PROVIDER", self.provider)

    def calls(self) -> list[ReadableSpan]:
        """Return the spans of calls to a server, in the order of their ends."""
        return [span for span in self.exporter.get_finished_spans() if "/" in span.name]

    def parents(self) -> list[tuple[str, str]]:
        """Return the method of each call, and the name of the span that is its parent; empty if it has none."""
        names = {span.context.span_id: span.name for span in self.exporter.get_finished_spans()}
        return [
            (span.name.rpartition("/")[2], names[span.parent.span_id] if span.parent else "")
            for span in self.calls()
        ]
