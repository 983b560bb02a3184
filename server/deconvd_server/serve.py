"""Serves calls, whichever transport brings them: errors end here, and observers hear of each call's begin and end.

A transport says who calls what, and for how long. It runs the method in the block of a `Serving`, and sends what comes
of it: an answer with the call's ledger, or a failure.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol

from google.rpc import status_pb2

from deconvd.errors import CallCancelledError, DeconvdError, InternalError
from deconvd.line import LineBrokenError
from deconvd.status import status_from_error
from deconvd_server.call import Call
from deconvd_server.log_text import excerpt

__all__ = ["CallLog", "Observer", "Serving"]

_OK: Final = "OK"

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Hears of every call, from the thread that serves it. What it does takes time of the call, and must not raise."""

    def begin(self, method: str, call: Call) -> None:
        """Note that a call begins."""

    def end(self, method: str, call: Call, status: str, error: Exception | None) -> None:
        """Note that a call has ended.

        Args:
            status: The name of its gRPC status; CANCELLED if its caller has gone.
            error: What the method raised, of a caller who may still be there. It holds the frames
                that it went through, and what they hold: not to be kept.
        """


class CallLog:
    """The observer that logs: each call's begin for debugging, and what a call has failed with."""

    def begin(self, method: str, call: Call) -> None:
        """Log that a call begins."""
        _log.debug("%s from %s: begun", method, call.peer)

    def end(self, method: str, call: Call, status: str, error: Exception | None) -> None:
        """Log what a call has failed with: its traceback, too, if that was not foreseen."""
        if error is None:
            return
        if isinstance(error, DeconvdError):
            # that a caller goes is nothing to look into
            level = logging.INFO if isinstance(error, CallCancelledError) else logging.WARNING
            _log.log(level, "%s from %s: %s: %s", method, call.peer, status, excerpt(error))
        elif status == CallCancelledError.status:
            _log.info("%s from %s: the caller has gone", method, call.peer)
        else:
            _log.error("%s from %s: unforeseen error", method, call.peer, exc_info=error)


class Serving:
    """A call, and the ``with`` block that serves it: the block's value is the call.

    Errors end with the block, and become its failure. There is nobody to tell of two kinds, which
    cancel the call and go on to the transport: `LineBrokenError`, and what is no `Exception`, such
    as the end of a generator that nobody wants the rest of.

    Attributes:
        call: Begins with this object.
        failure: What the caller must be told instead of an answer, once the block has ended; None
            if it ended well.

    Args:
        method: Its name.
        peer: Who calls, for the log.
        timeout_s: Seconds until the call's deadline; None for no deadline.
    """

    # a class, since a generator takes 0.6 us longer, and here is the way of each small call
    __slots__ = ("_method", "_observers", "call", "failure")

    def __init__(
        self, method: str, peer: str, timeout_s: float | None, observers: Sequence[Observer]
    ) -> None:
        self.call = Call(timeout_s, peer)
        self.failure: status_pb2.Status | None = None
        self._method = method
        self._observers = observers

    def __enter__(self) -> Call:
        for observer in self._observers:
            observer.begin(self._method, self.call)
        return self.call

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None:
            self._end(_OK, None)
            return False
        if isinstance(error, LineBrokenError) or not isinstance(error, Exception):
            self.call.cancel()
            self._end(CallCancelledError.status, None)
            return False
        told = _told(error, self.call)
        # The status, and not the error: this object is in a frame that the error holds.
        self.failure = status_from_error(told)
        self._end(told.status, error)
        return True

    def _end(self, status: str, error: Exception | None) -> None:
        for observer in self._observers:
            observer.end(self._method, self.call, status, error)


def _told(error: Exception, call: Call) -> DeconvdError:
    """Return what the caller is told of an error: nothing of what was not foreseen."""
    if isinstance(error, DeconvdError):
        return error
    if call.is_cancelled:
        return CallCancelledError("the caller has gone")
    return InternalError("unforeseen error: see the server's log")
