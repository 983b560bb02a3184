"""A session's call, which stays open for as long as the session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import grpc

from deconvd.errors import DeadlineError, InternalError
from deconvd.v1 import deconvd_pb2 as pb

__all__ = ["SessionStream"]


class SessionStream:
    """A call of HoldSession under way.

    Attributes:
        opened: What the server answered.
    """

    def __init__(
        self, call: grpc.Call, signs: SimpleQueue[bytes | None], opened: pb.HoldSessionResponse
    ) -> None:
        self._call = call
        self._requests = signs
        self.response = opened

    @classmethod
    def open(
        cls,
        rpc: grpc.StreamStreamMultiCallable[bytes, bytes],
        opening: pb.HoldSessionRequest,
        timeout_s: float,
    ) -> SessionStream:
        """Begin a call, and return once the server has answered the first message.

        Raises:
            DeadlineError: It has not in time.
            InternalError: It has ended the call instead.
            grpc.RpcError: As gRPC does.
        """
        signs: SimpleQueue[bytes | None] = SimpleQueue()
        signs.put(opening.SerializeToString())
        call = rpc(iter(signs.get, None))
        try:
            return cls(call, signs, _receive_first(call, timeout_s))
        except BaseException:
            signs.put(None)  # or gRPC's thread would wait for more
            raise

    def send_heartbeat(self) -> None:
        """Give a sign of life."""
        self._requests.put(pb.HoldSessionRequest().SerializeToString())

    def close(self) -> None:
        """End the session."""
        self._requests.put(None)

    def cancel(self) -> None:
        """Break the call off; it does no harm if it has ended."""
        self._requests.put(None)
        self._call.cancel()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback` in another thread once it has ended; at once if it has already."""
        if not self._call.add_callback(callback):
            callback()


def _receive_first(call: Any, timeout_s: float) -> pb.HoldSessionResponse:
    """Return the first response of a call that has no deadline."""
    deadline_s = time.monotonic() + timeout_s
    impatience = threading.Timer(timeout_s, call.cancel)
    impatience.daemon = True
    impatience.start()
    try:
        answer = next(call, None)
    except grpc.RpcError:
        if time.monotonic() >= deadline_s:
            raise DeadlineError("the server did not open a session in time") from None
        raise
    finally:
        impatience.cancel()
    if answer is None:
        raise InternalError("the server ended a session without a word")
    return pb.HoldSessionResponse.FromString(answer)
