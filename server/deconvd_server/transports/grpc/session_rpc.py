"""A gRPC call that is open for long. It takes a worker for each of its messages, and none in between.

BEGINNING --opened--> HELD --a message--> HELD --its end--> CLOSING --not broken--> ENDED

The server may hang up, and the caller may go, in any of them: it is ENDED then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from deconvd.errors import CallCancelledError, InvalidArgumentError, UnavailableError
from deconvd_server.call.context import CallerGoneError
from deconvd_server.resources.worker_threads import Workers
from deconvd_server.service.method import SessionHandler, SessionMethod
from deconvd_server.transports.grpc.rpc import Rpc
from deconvd_server.transports.serve import CallScope

__all__ = ["SessionRpc"]

_BREAK_S: Final = 0.2
"""How long after a stream's last message gRPC may take to say that it broke rather than was closed."""


class SessionRpc:
    """A call that is open for long.

    Args:
        workers: Do what its messages ask for.
    """

    def __init__(
        self, behaviour: SessionMethod, rpc: Rpc, serving: CallScope, workers: Workers
    ) -> None:
        rpc.is_idle = True
        self._method = behaviour
        self._rpc = rpc
        self._serving = serving
        self._workers = workers
        self._lock = threading.Lock()
        self._has_ended = False
        self._handler: SessionHandler | None = None

    def begin(self, first: bytes | None) -> None:
        """Begin to serve it. Raises UnavailableError if there is no worker."""
        self._workers.submit(partial(self._run, partial(self._open, first)))

    def _open(self, first: bytes | None) -> None:
        call = self._serving.__enter__()
        call.on_cancel(partial(self._end, CallerGoneError("the caller has gone")))
        if first is None:
            raise InvalidArgumentError("a session must begin with a message, got none")
        holding = self._method.serve(self._decode_message(first), call, self._close_stream)
        self._handler = holding
        self._rpc.send(holding.response.SerializeToString(), _do_nothing)
        self._rpc.receive(self._receive)

    def _receive(self, data: bytes | None) -> None:
        """Have a worker serve the next message, or the end of the messages."""
        if data is None:
            self._rpc.call_later(_BREAK_S, partial(self._submit, self._close))
        else:
            self._submit(partial(self._handle, data))

    def _handle(self, data: bytes) -> None:
        assert self._handler is not None
        self._handler.handle(self._decode_message(data))
        self._rpc.receive(self._receive)

    def _close(self) -> None:
        assert self._handler is not None
        if self._serving.call.is_cancelled:
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
        self._end(CallCancelledError("the server has hung up"))

    def _end(self, error: Exception | None) -> None:
        """End it, in any thread. Later times nothing is done."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
        self._serving.__exit__(None if error is None else type(error), error, None)
        if self._serving.failure is not None:
            self._rpc.fail(self._serving.failure)
        elif error is None:
            self._rpc.finish(self._serving.call.ledger.as_metadata())


def _do_nothing() -> None:
    pass
