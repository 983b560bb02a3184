"""The messages of a gRPC stream, between gRPC's thread, where they come and go, and the worker that serves the call.

Neither side is more than one message ahead of the other: gRPC's flow control bounds what is held for a client that is
slower, or faster, than its call.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from queue import SimpleQueue

from deconvd.errors import CallCancelledError
from deconvd_server.call.context import CallContext, CallerGoneError
from deconvd_server.resources.fair_shares import PeerPlace
from deconvd_server.transports.grpc.rpc import Rpc

__all__ = ["RequestQueue", "ResponseQueue"]


class RequestQueue:
    """What the client sends.

    Args:
        first: The first message, which has come; None if the client sends none.
        rpc: The rest comes from there.
        call: Once it is cancelled there is no more.
        place: Is told of progress.
    """

    def __init__(self, first: bytes | None, rpc: Rpc, call: CallContext, place: PeerPlace) -> None:
        self._rpc = rpc
        self._call = call
        self._place = place
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._messages.put(first)
        call.on_cancel(self._wake)

    def __iter__(self) -> Iterator[bytes]:
        """Yield the messages, in the worker: the next is received while it has one.

        Raises:
            CallCancelledError: The caller has gone.
        """
        while (message := self._next()) is not None:
            self._rpc.receive(self._messages.put)
            yield message

    def _next(self) -> bytes | None:
        self._call.client_wait.blocked_since_s = time.monotonic()
        message = self._messages.get()
        self._call.client_wait.blocked_since_s = math.inf
        if self._call.is_cancelled:
            raise CallCancelledError("the caller gave the call up")
        self._place.note_progress()
        return message

    def _wake(self) -> None:
        self._messages.put(None)


class ResponseQueue:
    """What the client is sent.

    Args:
        call: Once it is cancelled nobody is there to be sent anything.
        place: Is told of progress.
    """

    def __init__(self, rpc: Rpc, call: CallContext, place: PeerPlace) -> None:
        self._rpc = rpc
        self._call = call
        self._place = place
        self._send_permits: SimpleQueue[None] = SimpleQueue()
        self._send_permits.put(None)
        call.on_cancel(self._make_room)

    def put(self, message: bytes) -> None:
        """Send a message, in the worker, once the one before has left.

        Raises:
            CallerGoneError: The caller has gone.
            DeconvdError: The server has stopped the call.
        """
        self._wait()
        self._rpc.send(message, self._make_room)

    def flush(self) -> None:
        """Return once the last message has left. Raises as `put` does."""
        self._wait()

    def _wait(self) -> None:
        self._call.client_wait.blocked_since_s = time.monotonic()
        self._send_permits.get()
        self._call.client_wait.blocked_since_s = math.inf
        if self._call.is_cancelled:
            raise self._call.stop_error or CallerGoneError("the caller gave the call up")
        self._place.note_progress()

    def _make_room(self) -> None:
        self._send_permits.put(None)
