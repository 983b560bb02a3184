"""A gRPC call that stays open for long. It has a worker while it handles a message, and none in between.

    BEGINNING --opened--> HELD --message--> HELD --end of messages--> CLOSING --not broken--> ENDED

In any state the server may close the stream, or the caller may go: the call is ENDED then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from deconvd.errors import (
    CallCancelledError,
    InvalidArgumentError,
    UnauthenticatedError,
    UnavailableError,
)
from deconvd_server.call.context import CallerGoneError
from deconvd_server.resources.worker_threads import Workers
from deconvd_server.service.method import SessionHandler, SessionMethod
from deconvd_server.transports.grpc.rpc import Rpc
from deconvd_server.transports.serve import CallScope

__all__ = ["SessionRpc"]

_BREAK_S: Final = 0.2
"""How long gRPC may take, after the end of a stream's messages, to tell that the stream broke. A client that closes its
stream ends its session; a client whose stream breaks keeps it, and may resume it."""


class SessionRpc:
    """A call that stays open for long.

    Args:
        workers: The threads that handle its messages.
    """

    def __init__(self, method: SessionMethod, rpc: Rpc, scope: CallScope, workers: Workers) -> None:
        rpc.is_idle = True
        self._method = method
        self._rpc = rpc
        self._scope = scope
        self._workers = workers
        self._lock = threading.Lock()
        self._has_ended = False
        self._handler: SessionHandler | None = None

    def begin(self, first: bytes | None) -> None:
        """Have a worker open the session. Raises UnavailableError if there is no worker."""
        self._workers.submit(partial(self._run, partial(self._open, first)))

    def _open(self, first: bytes | None) -> None:
        call = self._scope.__enter__()
        call.on_cancel(partial(self._end, CallerGoneError("the caller has gone")))
        if first is None:
            raise InvalidArgumentError("a session must begin with a message, got none")
        handler = self._method.serve(self._decode_message(first), call, self._close_stream)
        self._handler = handler
        self._rpc.send(handler.response.SerializeToString(), _do_nothing)
        self._rpc.receive(self._receive)

    def _receive(self, data: bytes | None) -> None:
        """Have a worker handle the next message, or the end of the messages."""
        if data is None:
            self._rpc.call_later(_BREAK_S, partial(self._submit, self._close))
            return
        try:
            self._rpc.check_caller()
        except UnauthenticatedError as error:
            self._end(error)
        else:
            self._submit(partial(self._handle, data))

    def _handle(self, data: bytes) -> None:
        assert self._handler is not None
        self._handler.handle(self._decode_message(data))
        self._rpc.receive(self._receive)

    def _close(self) -> None:
        assert self._handler is not None
        if self._scope.call.is_cancelled:
            raise CallCancelledError("the stream broke")
        self._handler.end()
        self._end(None)

    def _decode_message(self, data: bytes) -> Any:
        return self._method.decode_request(data).message

    def _submit(self, work: Callable[[], None]) -> None:
        try:
            self._workers.submit(partial(self._run, work))
        except UnavailableError as error:
            self._end(error)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - whatever it is, it ends the call
            self._end(error)

    def _close_stream(self) -> None:
        self._end(CallCancelledError("the server has closed the stream"))

    def _end(self, error: Exception | None) -> None:
        """End the call, in any thread. Only the first time counts."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
        self._scope.__exit__(None if error is None else type(error), error, None)
        if self._scope.failure is not None:
            self._rpc.fail(self._scope.failure)
        elif error is None:
            self._rpc.finish(self._scope.call.ledger.as_metadata())


def _do_nothing() -> None:
    pass
