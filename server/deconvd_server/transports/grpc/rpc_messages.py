"""The messages of a gRPC stream, on their way between gRPC's thread and the worker that serves the call.

    gRPC's thread                         worker
    receives a message  --RequestQueue-->  reads it: only now is the next one asked for
    it has left: permit --ResponseQueue->  sends the next

Neither side is ever more than one message ahead of the other. So gRPC's flow control bounds what the server holds for a
client that sends faster than its call reads, or takes less than its call writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.errors import CallCancelledError, UnavailableError
from deconvd.wire.chunks import part_messages
from deconvd_server.call.context import (
    STALL_LIMIT_S,
    CallContext,
    CallerGoneError,
    ClientWaitState,
)
from deconvd_server.resources.fair_shares import PeerPlace
from deconvd_server.service.method import Parts
from deconvd_server.transports.grpc.rpc import Rpc

__all__ = ["RequestQueue", "ResponseQueue"]

_STALL_S: Final = STALL_LIMIT_S + 1.0
"""How long a call may wait for its client. The watch over streams ends those that hold memory a moment sooner. But a
call may wait without such memory, too: for the end of its messages, or until the last of its answer has left."""

_RETRY_AFTER_S: Final = 0.5
"""When the client of a call that has sent nothing for so long may try again."""


class RequestQueue:
    """The messages that a client sends.

    Args:
        first: The first message, which has come already; None if the client sends none.
        rpc: Receives the others.
        call: Its cancellation wakes the worker.
        place: The place of the call: it is told of each message, as progress.
    """

    def __init__(self, first: bytes | None, rpc: Rpc, call: CallContext, place: PeerPlace) -> None:
        self._rpc = rpc
        self._call = call
        assert isinstance(call.client_wait, ClientWaitState), call.client_wait
        self._wait = call.client_wait
        self._place = place
        self._messages: SimpleQueue[bytes | None] = SimpleQueue()
        self._messages.put(first)
        call.on_cancel(partial(self._messages.put, None))

    def __iter__(self) -> Iterator[bytes]:
        """Yield the messages, in the worker. While it handles one, the next is received.

        Raises:
            CallCancelledError: The caller has gone.
            UnavailableError: It has sent nothing for too long.
        """
        while True:
            self._wait.blocked_since_s = time.monotonic()
            try:
                message = self._messages.get(timeout=_STALL_S)
            except Empty:
                raise UnavailableError(
                    f"the client has sent no message of the call for {_STALL_S:g} s, and not said that it was the last",
                    retry_after_s=_RETRY_AFTER_S,
                ) from None
            self._wait.blocked_since_s = math.inf
            if self._call.is_cancelled:
                raise CallCancelledError("the caller gave the call up")
            self._place.progressed_s = time.monotonic()
            if message is None:
                return
            self._rpc.receive(self._messages.put)
            yield message


class ResponseQueue:
    """The messages that a client is sent.

    Args:
        call: Its cancellation wakes the worker.
        place: The place of the call: it is told of each message, as progress.
    """

    def __init__(self, rpc: Rpc, call: CallContext, place: PeerPlace) -> None:
        self._rpc = rpc
        self._call = call
        assert isinstance(call.client_wait, ClientWaitState), call.client_wait
        self._wait = call.client_wait
        self._place = place
        self._send_permits: SimpleQueue[None] = SimpleQueue()
        self._permit_send = partial(self._send_permits.put, None)
        self._permit_send()
        call.on_cancel(self._permit_send)

    def send_all(self, parts: Parts) -> None:
        """Send the parts of a response, in the worker; return once the last message has left.

        A message is made while the one before leaves, and is sent once that has left.

        Raises:
            CallerGoneError: The caller has gone, or has taken nothing for too long.
            DeconvdError: The server has stopped the call.
        """
        messages = chain.from_iterable(map(part_messages, parts))
        for message in chain(messages, (None,)):
            self._wait.blocked_since_s = time.monotonic()
            try:
                self._send_permits.get(timeout=_STALL_S)
            except Empty:
                self._rpc.cancel()  # a status would wait behind what the client does not take
                raise CallerGoneError(f"the caller has taken nothing for {_STALL_S:g} s") from None
            self._wait.blocked_since_s = math.inf
            if self._call.is_cancelled:
                raise self._call.stop_error or CallerGoneError("the caller gave the call up")
            self._place.progressed_s = time.monotonic()
            if message is not None:
                self._rpc.send(message, self._permit_send)
