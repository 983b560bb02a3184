"""Observers of calls: the log, and the place for metrics and traces. `serve` tells each of them of every call."""

from __future__ import annotations

import logging
from typing import Protocol

from deconvd.errors import CallCancelledError, DeconvdError, UnavailableError
from deconvd_server.call.context import CallContext
from deconvd_server.log_text import excerpt

__all__ = ["CallLog", "Observer"]

_log = logging.getLogger(__name__)


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
    """Logs the beginning of each call at DEBUG, and each failure with its cause."""

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
            _log.log(level, "%s from %s: %s: %s", method, call.peer, status, excerpt(error))
        elif status == CallCancelledError.status:
            _log.info("%s from %s: the caller has gone", method, call.peer)
        else:
            _log.error("%s from %s: unforeseen error", method, call.peer, exc_info=error)
