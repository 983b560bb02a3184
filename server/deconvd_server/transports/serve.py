"""Serves calls, whichever transport brings them: each call has a context, ends with a status, and is observed.

A transport makes a `CallContext` and a `CallScope` of it. It runs the method in the scope's block, and then sends
either the answer with the call's ledger, or the failure.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from types import TracebackType
from typing import Final

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
from deconvd_server.transports.observers import Observer

__all__ = ["CallScope"]

_OK: Final = "OK"

_REQUEST_ID_BYTES: Final = 8

_NO_THREAD: Final = "can't start new thread"
"""The text of the interpreter's RuntimeError when the system has no thread left."""


class CallScope:
    """A call, and the ``with`` block that serves it. The block's value is the call's context.

    An error that the block raises becomes `failure`, and is not raised further. There are two exceptions, because
    nobody is left to be told: `CallerGoneError`, and errors that are not an `Exception`, such as the GeneratorExit of
    a response that is not read to its end. Both cancel the call and are raised further.

    Attributes:
        call: The call.
        failure: The status that the caller gets instead of an answer, once the block has ended; None if it ended well.

    Args:
        method: The method's name.
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
        status, observed = _OK, None
        if isinstance(error, CallerGoneError) or not isinstance(error, (Exception, type(None))):
            self.call.cancel()
            status = CallCancelledError.status
        elif error is not None:
            reported = _reported_error(error, self.call)
            # Kept as a status: the error refers to the frame of the block, and that frame to this object.
            call = self.call
            if not call.request_id:  # so that whoever gets the error can find it in the log
                call.request_id = secrets.token_hex(_REQUEST_ID_BYTES)
            self.failure = status_from_error(reported, call.request_id)
            status, observed = reported.status, error
        for observer in self._observers:
            observer.end(self._method, self.call, status, observed)
        return self.failure is not None


def _reported_error(error: Exception, call: CallContext) -> DeconvdError:
    """Return the error that the caller is told: it contains nothing of an unforeseen error.

    Memory and threads may run out anywhere in a call, so both are foreseen here for all methods.
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
