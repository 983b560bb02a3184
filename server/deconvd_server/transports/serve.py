"""Serves calls, whichever transport brings them: each has a context, ends with a status, and is observed.

A transport makes a `Call`, by whom and with what deadline, and a `Serving` of it. It runs the method in its block, and
sends the answer with the call's ledger, or the failure.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol

from google.rpc import status_pb2

from deconvd.errors import (
    CallCancelledError,
    DeconvdError,
    ExhaustedError,
    InternalError,
    UnavailableError,
)
from deconvd.wire.status import status_from_error
from deconvd_server.call.context import CallContext, CallerGoneError
from deconvd_server.log_text import excerpt

__all__ = ["CallLog", "CallScope", "Observer"]

_OK: Final = "OK"

_NO_THREAD: Final = "can't start new thread"
"""What the interpreter says of that."""

_log = logging.getLogger(__name__)


class Observer(Protocol):
    """Hears of every call, in the thread that serves it: it must be quick, and must not raise."""

    def begin(self, method: str, call: CallContext) -> None:
        """Note that a call begins."""

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """Note that a call has ended.

        Args:
            status: The name of its gRPC status; CANCELLED if its caller has gone.
            error: What the method raised; None if nobody could be told of it. Not to be kept: it
                holds the frames that it went through, and their tensors.
        """


class CallLog:
    """The observer that logs: each call's begin for debugging, and what a call has failed with."""

    def begin(self, method: str, call: CallContext) -> None:
        """Log that a call begins."""
        if _log.isEnabledFor(logging.DEBUG):  # cheaper than `debug` alone
            _log.debug("%s from %s: begun", method, call.peer)

    def end(self, method: str, call: CallContext, status: str, error: Exception | None) -> None:
        """Log what a call has failed with: its traceback, too, if that was not foreseen."""
        if error is None:
            return
        if isinstance(error, (DeconvdError, MemoryError)) or status == UnavailableError.status:
            # that a caller goes is nothing to look into
            level = logging.INFO if isinstance(error, CallCancelledError) else logging.WARNING
            _log.log(level, "%s from %s: %s: %s", method, call.peer, status, excerpt(error))
        elif status == CallCancelledError.status:
            _log.info("%s from %s: the caller has gone", method, call.peer)
        else:
            _log.error("%s from %s: unforeseen error", method, call.peer, exc_info=error)


class CallScope:
    """A call, and the ``with`` block that serves it: the block's value is the call.

    An error that the block raises becomes its failure, and is not raised further. Two kinds are, and
    cancel the call, since nobody is there to be told: `CallerGoneError`, and what is no `Exception`,
    such as the GeneratorExit of a response that is not read to its end.

    Attributes:
        call: The call.
        failure: What the caller must be told instead of an answer, once the block has ended; None
            if it ended well.

    Args:
        method: Its name.
    """

    # A class, since a context made of a generator takes 0.6 us, and each small call goes through here.
    __slots__ = ("_method", "_observers", "call", "failure")

    def __init__(self, method: str, call: CallContext, observers: Sequence[Observer]) -> None:
        self.call = call
        self.failure: status_pb2.Status | None = None
        self._method = method
        self._observers = observers

    def __enter__(self) -> CallContext:
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
            for observer in self._observers:
                observer.end(self._method, self.call, _OK, None)
            return False
        if isinstance(error, CallerGoneError) or not isinstance(error, Exception):
            self.call.cancel()
            self._end(CallCancelledError.status, None)
            return False
        told = _reported_error(error, self.call)
        # Kept as a status: the error holds the frame of the block, which holds this object.
        self.failure = status_from_error(told)
        self._end(told.status, error)
        return True

    def _end(self, status: str, error: Exception | None) -> None:
        for observer in self._observers:
            observer.end(self._method, self.call, status, error)


def _reported_error(error: Exception, call: CallContext) -> DeconvdError:
    """Return what the caller is told of an error: nothing of what was not foreseen.

    Memory and threads may run out anywhere, so that is foreseen here for all.
    """
    if call.stop_error is not None:
        return call.stop_error
    if isinstance(error, DeconvdError):
        return error
    if call.is_cancelled:
        return CallCancelledError("the caller has gone")
    if isinstance(error, MemoryError):
        return ExhaustedError(
            "the server's memory has run out for this call: send fewer samples at a time, or try "
            "again later"
        )
    if isinstance(error, RuntimeError) and str(error) == _NO_THREAD:
        return UnavailableError("the server has no thread left for this call", retry_after_s=1.0)
    return InternalError("unforeseen error: see the server's log")
