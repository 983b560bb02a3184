"""The HoldSession call of a session, which stays open for as long as the session lives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

import grpc

from deconvd.errors import DeadlineError, InternalError
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.responses import malformed_response, parse_response
from deconvd_client.credentials import CallMetadata

__all__ = ["SessionStream"]

_MIN_LEASE_S: Final = 0.01
"""The shortest lease of a session. Several heartbeats are sent in each."""


class SessionStream:
    """A HoldSession call under way.

    Attributes:
        response: The server's answer to the first message.

    Args:
        call: The RPC.
        requests: Messages to send; None ends the request stream.
    """

    def __init__(
        self,
        call: grpc.Call,
        requests: SimpleQueue[bytes | None],
        response: pb.HoldSessionResponse,
    ) -> None:
        self._call = call
        self._requests = requests
        self.response = response

    @classmethod
    def open(
        cls,
        rpc: grpc.StreamStreamMultiCallable[bytes, bytes],
        opening: pb.HoldSessionRequest,
        timeout_s: float,
        metadata: CallMetadata | None = None,
    ) -> SessionStream:
        """Begin a call, and return once the server has answered the first message.

        Raises:
            DeadlineError: The server did not answer in time.
            InternalError: The server ended the call without an answer.
            grpc.RpcError: The call failed.
        """
        requests: SimpleQueue[bytes | None] = SimpleQueue()
        requests.put(opening.SerializeToString())
        call = rpc(iter(requests.get, None), metadata=metadata)
        try:
            return cls(call, requests, _receive_first(call, timeout_s))
        except BaseException:
            requests.put(None)  # or gRPC's thread would wait for the next message for ever
            raise

    def send_heartbeat(self) -> None:
        """Extend the lease of the session."""
        self._requests.put(pb.HoldSessionRequest().SerializeToString())

    def close(self) -> None:
        """End the session."""
        self._requests.put(None)

    def cancel(self) -> None:
        """Cancel the call. That is harmless if it has ended."""
        self._requests.put(None)
        self._call.cancel()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` in another thread once the call has ended; in this one if it has ended already."""
        if not self._call.add_callback(callback):
            callback()


def _receive_first(call: Any, timeout_s: float) -> pb.HoldSessionResponse:
    """Return the first response. The call itself has no deadline, so a timer cancels it if there is none in time."""
    deadline_s = time.monotonic() + timeout_s
    timer = threading.Timer(timeout_s, call.cancel)
    timer.daemon = True
    timer.start()
    try:
        answer = next(call, None)
    except grpc.RpcError:
        if time.monotonic() >= deadline_s:
            raise DeadlineError("the server did not open a session in time") from None
        raise
    finally:
        timer.cancel()
    if answer is None:
        raise InternalError("the server closed the session's stream without an answer")
    response = parse_response(pb.HoldSessionResponse, answer)
    if not response.lease_s >= _MIN_LEASE_S:  # of no use, and each heartbeat would be due at once
        raise malformed_response(pb.HoldSessionResponse, f"its lease is {response.lease_s} s")
    return response
