"""Spans of calls, where OpenTelemetry is set up in the server's process, as by the command `opentelemetry-instrument`.

Without it nothing of OpenTelemetry is imported, and calls have no observer for it.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any, Final

import deconvd
from deconvd.wire.span_attributes import (
    STATUS_CODE,
    call_attributes,
    problem_attributes,
    span_name,
    status_number,
)
from deconvd_server.call.context import CallContext

__all__ = ["CallTracer"]

_API: Final = "opentelemetry.trace"

_HOUSEKEEPING: Final = frozenset({"DropTensors", "GetServerInfo", "HoldSession"})
"""Methods that clients call on their own account. They are traced only if the caller has named a span."""

_FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""The statuses that count as errors of a server, by OpenTelemetry's conventions. Others are its callers' errors."""


class CallTracer:
    """Records a span for each call when the call ends. It observes calls: see `Observer`.

    The span's parent is the span that the request names, or the metadata of gRPC. Its times are those of the ledger.
    It is made only at the end, since the parent is known only when the request is parsed.

    Args:
        provider: A TracerProvider of OpenTelemetry.
    """

    def __init__(self, provider: Any) -> None:
        # here, because without OpenTelemetry there is nothing to import
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = provider.get_tracer("deconvd_server", deconvd.__version__)
        self._kind = SpanKind.SERVER
        self._extract = TraceContextTextMapPropagator().extract
        self._failed = Status(StatusCode.ERROR)
        self._flusher = _Flusher(provider)

    @classmethod
    def find(cls) -> CallTracer | None:
        """Return a tracer if OpenTelemetry is set up in this process; None if not."""
        trace = sys.modules.get(_API)
        if trace is None:
            return None
        provider = trace.get_tracer_provider()
        if isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider)):
            return None
        return cls(provider)

    def begin(self, method: str, call: CallContext) -> None:
        """Do nothing: all is known when the call ends."""

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """Record a call."""
        if method in _HOUSEKEEPING and not call.trace_headers:
            return
        # in this order: a thread that is interrupted between the two must not seem to have begun before its caller
        passed_ns = round((time.perf_counter() - call.ledger.began_s) * 1e9)
        now_ns = time.time_ns()
        span = self._tracer.start_span(
            span_name(method),
            context=self._extract(call.trace_headers),
            kind=self._kind,
            attributes=_attributes(method, call, status),
            start_time=now_ns - passed_ns,
        )
        call.trace_id = f"{span.get_span_context().trace_id:032x}"  # for the access log
        if error is not None:
            span.set_attribute("error.type", status)
            if status in _FAULTS:
                span.record_exception(error)
                span.set_status(self._failed)
        span.end(now_ns)

    def flush(self, timeout_s: float) -> None:
        """Have all spans sent; return once they are, or the time is up."""
        self._flusher.flush(timeout_s)


class _Flusher:
    """A thread that sends the spans that are left at the end of the process. See `Drainer` on why it starts early."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._begin = threading.Event()
        self._is_done = threading.Event()
        threading.Thread(target=self._run, name="spans", daemon=True).start()

    def flush(self, timeout_s: float) -> None:
        self._begin.set()
        self._is_done.wait(timeout_s)

    def _run(self) -> None:
        self._begin.wait()
        # OpenTelemetry's API has no such method, and its SDK has
        getattr(self._provider, "force_flush", lambda: None)()
        self._is_done.set()


def _attributes(method: str, call: CallContext, status: str) -> dict[str, Any]:
    """Return what a span says about a call that has ended."""
    found = call_attributes(method) | {
        STATUS_CODE: status_number(status),
        "deconvd.peer": call.peer,
        "deconvd.transport": call.transport,
        "deconvd.received_bytes": call.received_bytes,
        "deconvd.sent_bytes": call.sent_bytes,
    }
    if call.identity:
        found["enduser.id"] = call.identity
    if call.request_id:
        found["deconvd.request_id"] = call.request_id
    if call.problem is not None:
        found |= problem_attributes(call.problem)
    for stage, duration_us in call.ledger.times_us.items():
        found[f"deconvd.{stage}"] = duration_us
    return found
