"""Observers of calls: the log, and the place for metrics and traces. `serve` tells each of them of every call."""

from __future__ import annotations

import logging
import re
import time
from typing import Final, Protocol

from deconvd.errors import CallCancelledError, DeconvdError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.call.ledger import Stage
from deconvd_server.log_handler import REPEAT_KEY
from deconvd_server.log_text import FIELDS, excerpt

__all__ = ["AccessLog", "CallLog", "Observer"]

_NUMBER: Final = re.compile(r"[0-9][0-9.e+-]*")

_log = logging.getLogger(__name__)
_access_log = logging.getLogger("deconvd_server.access")


class Observer(Protocol):
    """Is told of every call, in the thread that serves the call: it must be quick, and must not raise."""

    def begin(self, method: str, call: CallContext) -> None:
        """Note that a call begins."""

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """Note that a call has ended.

        Args:
            status: The name of its gRPC status; CANCELLED if its caller has gone.
            error: The error that the method raised; None if it ended well, or its caller has gone. An observer must
                not keep it: it refers to the frames that it passed through, and so to the call's tensors.
        """


class CallLog:
    """Logs the beginning of each call at DEBUG, and each failure with its cause, equal ones once a second."""

    def begin(self, method: str, call: CallContext) -> None:
        """Log that a call begins."""
        if _log.isEnabledFor(logging.DEBUG):  # cheaper than `debug` alone
            _log.debug("%s from %s: begun", method, call.peer)

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """Log a failure. An unforeseen error is logged with its traceback."""
        if error is None:
            return
        if isinstance(error, (DeconvdError, MemoryError)) or status == UnavailableError.status:
            # a caller that goes is no reason to look into anything
            level = logging.INFO if isinstance(error, CallCancelledError) else logging.WARNING
            text = excerpt(error)
        elif status == CallCancelledError.status:
            level, text = logging.INFO, "the caller has gone"
        else:
            level, text = logging.ERROR, "unforeseen error"
        _log.log(
            level,
            "%s from %s (request %s): %s: %s",
            method,
            call.peer,
            call.request_id,
            status,
            text,
            exc_info=error if level == logging.ERROR else None,
            extra={
                # two refusals of an overloaded server differ in their numbers alone
                REPEAT_KEY: (method, status, _NUMBER.sub("", text), type(error)),
                FIELDS: {
                    "method": method,
                    "peer": call.peer,
                    "request_id": call.request_id,
                    "status": status,
                },
            },
        )


class AccessLog:
    """Logs each call when it ends, whatever the level of the log."""

    def __init__(self) -> None:
        _access_log.setLevel(logging.INFO)

    def begin(self, method: str, call: CallContext) -> None:
        """Do nothing: a call is logged when all is known about it."""

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """Log a call."""
        problem = call.problem
        times_us = {**call.ledger.times_us, Stage.SERVER: _passed_us(call)}
        stages_ms = {stage.removesuffix("_us"): us / 1e3 for stage, us in times_us.items()}
        fields = {
            "method": method,
            "transport": call.transport,
            "peer": call.peer,
            "identity": call.identity,
            "request_id": call.request_id,
            "trace_id": call.trace_id,
            "status": status,
            "received_bytes": call.received_bytes,
            "sent_bytes": call.sent_bytes,
            "ms": stages_ms,
        }
        caller = f" by {call.identity}" if call.identity else ""
        trace = f", trace {call.trace_id}" if call.trace_id else ""
        shapes = ""
        if problem is not None:
            fields |= {
                "x": list(problem.x.shape),
                "w": list(problem.W.shape),
                "y": list(problem.y.shape),
            }
            shapes = f" x={problem.x} W={problem.W}"
        _access_log.info(
            "%s %s%s from %s (request %s%s): %s%s in=%d out=%d ms: %s",
            method,
            call.transport,
            caller,
            call.peer,
            call.request_id or "-",
            trace,
            status,
            shapes,
            call.received_bytes,
            call.sent_bytes,
            " ".join(f"{stage}={ms:.3f}" for stage, ms in stages_ms.items()),
            extra={FIELDS: fields},
        )


def _passed_us(call: CallContext) -> int:
    return round((time.perf_counter() - call.ledger.began_s) * 1e6)
