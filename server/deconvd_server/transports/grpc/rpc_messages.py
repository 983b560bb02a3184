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
from queue import SimpleQueue

from deconvd.errors import CallCancelledError
from deconvd.wire.chunks import part_messages
from deconvd_server.call.context import CallContext, CallerGoneError, ClientWaitState
from deconvd_server.resources.fair_shares import PeerPlace
from deconvd_server.service.method import Parts
from deconvd_server.transports.grpc.rpc import Rpc

__all__ = ["RequestQueue", "ResponseQueue"]


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
        """
        while True:
            self._wait.blocked_since_s = time.monotonic()
            message = self._messages.get()
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
            CallerGoneError: The caller has gone.
            DeconvdError: The server has stopped the call.
        """
        messages = chain.from_iterable(map(part_messages, parts))
        for message in chain(messages, (None,)):
            self._wait.blocked_since_s = time.monotonic()
            self._send_permits.get()
            self._wait.blocked_since_s = math.inf
            if self._call.is_cancelled:
                raise self._call.stop_error or CallerGoneError("the caller gave the call up")
            self._place.progressed_s = time.monotonic()
            if message is not None:
                self._rpc.send(message, self._permit_send)
