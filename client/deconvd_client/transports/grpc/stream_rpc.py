"""A streaming RPC in one thread, which takes gRPC's events itself.

    grpcio's streams                            this module
    one thread takes events, wakes the others   one thread takes an event,
    one sends messages                          sends the next message, or gives the one that has come
    one reads messages

Whichever thread copies a message holds the interpreter's lock, so three threads copy no faster than one. But each
message wakes two of them, and each of these must then wait for that lock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from enum import Enum
from typing import Any, Final, TypeAlias

import grpc

from deconvd_client.credentials import CallMetadata
from deconvd_client.transports.grpc.core import cygrpc

__all__ = ["Metadata", "StreamRpc", "StreamRpcError"]

Metadata: TypeAlias = tuple[Any, ...]

_NO_FLAGS: Final = 0

_CODES: Final = {code.value[0]: code for code in grpc.StatusCode}


class _Batch(Enum):
    """A batch of operations, by what its end says. At most one of each kind is under way."""

    STATUS = "the call has ended"
    INITIAL_METADATA = "the response has begun"
    RECEIVE = "a message has come, or there are no more"
    SEND = "a message has left"
    HALF_CLOSE = "the server knows that there are no more messages"


class StreamRpcError(grpc.RpcError):
    """The call has failed. It has the methods of `grpc.Call` that tell how."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Metadata) -> None:
        super().__init__(f"{code.name}: {details}")
        self._code = code
        self._details = details
        self._metadata = metadata

    def code(self) -> grpc.StatusCode:
        """Return the status code."""
        return self._code

    def details(self) -> str:
        """Return the server's or gRPC's text."""
        return self._details

    def trailing_metadata(self) -> Metadata:
        """Return the metadata that came with the status."""
        return self._metadata


class StreamRpc(Iterator[bytes]):
    """One streaming RPC, and an iterator over its responses. Only `cancel` may be called from other threads.

    Requests are sent while a response is waited for. At most one request is leaving, and one response waits inside
    gRPC. So gRPC's flow control bounds the memory.

    Args:
        channel: A channel of gRPC's core.
        requests: The messages to send. Each is taken once the one before has left.
        timeout_s: Seconds until gRPC ends the call.
        metadata: What the call carries beside its messages.

    The owner must call `close`, or gRPC never frees the call.
    """

    def __init__(
        self,
        channel: Any,
        path: str,
        requests: Iterator[bytes],
        timeout_s: float,
        metadata: CallMetadata | None = None,
    ) -> None:
        self._requests = requests
        self._response: bytes | None = None
        self._status: Any = None
        self._has_half_closed = False
        begin = (
            cygrpc.SendInitialMetadataOperation(metadata, _NO_FLAGS),
            cygrpc.ReceiveStatusOnClientOperation(_NO_FLAGS),
        )
        batches = {
            _Batch.STATUS: begin,
            _Batch.INITIAL_METADATA: (cygrpc.ReceiveInitialMetadataOperation(_NO_FLAGS),),
            _Batch.RECEIVE: (cygrpc.ReceiveMessageOperation(_NO_FLAGS),),
        }
        self._under_way = set(batches)
        self._call = channel.segregated_call(
            *(_NO_FLAGS, path.encode(), None, time.time() + timeout_s, (), None),
            [(operations, batch) for batch, operations in batches.items()],
            None,
        )

    def __next__(self) -> bytes:
        """Return the next response, and send requests until it has come.

        Raises:
            StreamRpcError: The call has failed.
        """
        self._send_next()
        while self._response is None:
            if self._status is not None and _Batch.RECEIVE not in self._under_way:
                self._check_status()
                raise StopIteration
            self._take_event()
            self._send_next()
        response, self._response = self._response, None
        return response

    def finish(self) -> Metadata:
        """Wait until the call has ended, without further responses; return the trailing metadata.

        Raises:
            StreamRpcError: The call has failed.
        """
        for _ in self:
            pass
        return self._trailing_metadata()

    def cancel(self) -> None:
        """End the call. It has no effect on one that has ended."""
        self._call.cancel(cygrpc.StatusCode.cancelled, "the caller gave the call up")

    def close(self) -> None:
        """End the call if it has not ended, and let gRPC free it."""
        if self._under_way:
            self.cancel()
        while self._under_way:
            self._take_event()

    def _send_next(self) -> None:
        """Send the next request if the one before has left, or say that there are no more."""
        if self._has_half_closed or self._status is not None or _Batch.SEND in self._under_way:
            return
        request = next(self._requests, None)
        if request is None:
            self._has_half_closed = True
            operation = cygrpc.SendCloseFromClientOperation(_NO_FLAGS)
            self._start(_Batch.HALF_CLOSE, operation)
        else:
            self._start(_Batch.SEND, cygrpc.SendMessageOperation(request, _NO_FLAGS))

    def _start(self, batch: _Batch, operation: Any) -> None:
        self._call.operate((operation,), batch)
        self._under_way.add(batch)

    def _take_event(self) -> None:
        """Wait for a batch to end, and note what it says."""
        event = self._call.next_event()
        self._under_way.discard(event.tag)
        if event.tag is _Batch.STATUS:
            self._status = event.batch_operations[-1]
        elif event.tag is _Batch.RECEIVE:
            self._response = event.batch_operations[0].message()
            if self._response is not None and self._status is None:
                self._start(_Batch.RECEIVE, cygrpc.ReceiveMessageOperation(_NO_FLAGS))

    def _check_status(self) -> None:
        code = _CODES.get(self._status.code(), grpc.StatusCode.UNKNOWN)
        if code is not grpc.StatusCode.OK:
            raise StreamRpcError(code, self._status.details(), self._trailing_metadata())

    def _trailing_metadata(self) -> Metadata:
        return tuple(self._status.trailing_metadata() or ())
