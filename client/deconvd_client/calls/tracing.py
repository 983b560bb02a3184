"""Spans of calls, where the program has set up OpenTelemetry: a span for each call to the server, as for an RPC.

The span's context travels in the request, so that the server's span becomes its child. Nothing of OpenTelemetry is
imported here: a program that records spans has imported its SDK. In others a call pays for a look into `sys.modules`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final

import deconvd
from deconvd.errors import DeconvdError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd.wire.grpc_options import unix_path
from deconvd.wire.ledger import parse_ledger
from deconvd.wire.span_attributes import STATUS_CODE, call_attributes, span_name, status_number
from deconvd.wire.trace_context import limit_tracestate

__all__ = [
    "TRACE_SDK",
    "CallSpan",
    "adopted_context",
    "capture_context",
    "current_call_span",
    "record_call",
    "record_if_traced",
    "records_spans",
]

TRACE_SDK: Final = "opentelemetry.sdk.trace"
"""The module that a program must have imported to record spans. The API alone, which libraries import, records none."""

_TRACE_API: Final = "opentelemetry.trace"
_CONTEXT_API: Final = "opentelemetry.context"


class CallSpan:
    """The span of a call that is under way. Its last attempt is the one that it tells of.

    Args:
        span: A span of OpenTelemetry. Its types are not named here, since it may not be installed.

    Attributes:
        is_direct: Whether a direct connection carries the attempt.
        shares_memory: Whether large tensors are in shared memory.
    """

    def __init__(self, span: Any) -> None:
        self.is_direct: bool = False
        self.shares_memory: bool = False
        self._target = ""
        self._span = span

    def begin_attempt(self, target: str) -> None:
        """Note that an attempt begins, and where it goes."""
        self._target = target
        self.is_direct = self.shares_memory = False

    def write_context(self, telemetry: pb.Telemetry) -> None:
        """Write the span's context into a request, for the server."""
        context = self._span.get_span_context()
        if context.is_valid:
            telemetry.traceparent = (
                f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            )
            telemetry.tracestate = limit_tracestate(context.trace_state.to_header())

    def note_retry(self, error: Exception) -> None:
        """Note that an attempt has failed, and that there will be another one."""
        self._span.add_event("retry", {"exception.message": str(error)})

    def finish(self, ledger: str) -> None:
        """Note that the call has succeeded, and where its time went on the server."""
        if not self._span.is_recording():
            return
        times = {f"deconvd.{name}": us for name, us in parse_ledger(ledger).items()}
        self._span.set_attributes({STATUS_CODE: 0, **self._way(), **times})

    def fail(self, error: DeconvdError) -> None:
        """Note that the call has failed. The context manager of the span itself notes what the error says."""
        found: dict[str, Any] = {
            STATUS_CODE: status_number(error.status),
            "error.type": error.status,
        }
        if error.request_id:
            found["deconvd.request_id"] = error.request_id
        self._span.set_attributes({**found, **self._way()})

    def _way(self) -> dict[str, Any]:
        """Return by which way the call went."""
        path = unix_path(self._target)
        if path:
            server: dict[str, Any] = {"server.address": path, "network.transport": "unix"}
        else:
            host, _, port = self._target.rpartition(":")
            server = {"server.address": host.strip("[]"), "network.transport": "tcp"}
            if port.isdecimal():
                server["server.port"] = int(port)
        if self.shares_memory:
            transport = "shared_memory"
        elif self.is_direct:
            transport = str(server["network.transport"])
        else:
            transport = "grpc"
        return {**server, "deconvd.transport": transport}


current_call_span: Final[ContextVar[CallSpan | None]] = ContextVar(
    "current_call_span", default=None
)
"""The span of the call that this thread makes; None if nobody records it. A plain variable: most calls only read it."""


def records_spans() -> bool:
    """Return whether the program has set up what records spans. To be called only if `TRACE_SDK` is imported."""
    trace = sys.modules[_TRACE_API]
    provider = trace.get_tracer_provider()
    return not isinstance(provider, (trace.ProxyTracerProvider, trace.NoOpTracerProvider))


def record_if_traced(
    method: str, attributes: Mapping[str, Any]
) -> AbstractContextManager[CallSpan | None]:
    """Record the call that a ``with`` block makes, as `record_call` does, if the program records spans."""
    if TRACE_SDK in sys.modules and records_spans():
        return record_call(method, attributes)
    return nullcontext()


@contextmanager
def record_call(method: str, attributes: Mapping[str, Any]) -> Iterator[CallSpan]:
    """Record the call that a ``with`` block makes as a child of the current span. The program must record spans."""
    trace = sys.modules[_TRACE_API]
    with _tracer_of(trace.get_tracer_provider()).start_as_current_span(
        span_name(method),
        kind=trace.SpanKind.CLIENT,
        attributes={**call_attributes(method), **attributes},
    ) as span:
        call_span = CallSpan(span)
        token = current_call_span.set(call_span)
        try:
            yield call_span
        except DeconvdError as error:
            call_span.fail(error)
            raise
        finally:
            current_call_span.reset(token)


@lru_cache(1)
def _tracer_of(provider: Any) -> Any:
    return provider.get_tracer("deconvd_client", deconvd.__version__)


def capture_context() -> Any:
    """Return the current context of OpenTelemetry, for another thread; None if the program records no spans."""
    if TRACE_SDK not in sys.modules or not records_spans():
        return None
    return sys.modules[_CONTEXT_API].get_current()


@contextmanager
def adopted_context(captured: Any) -> Iterator[None]:
    """Have the calls of a ``with`` block be children of a captured context, if this thread has no span of its own.

    Args:
        captured: What `capture_context` has returned.
    """
    if captured is None or sys.modules[_TRACE_API].get_current_span().get_span_context().is_valid:
        yield
        return
    context = sys.modules[_CONTEXT_API]
    token = context.attach(captured)
    try:
        yield
    finally:
        context.detach(token)
