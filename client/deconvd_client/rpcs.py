"""RPCs of a gRPC channel, made where no interrupt strikes, on a channel of this very process.

gRPC's Python holds locks of its own while it works. An exception from a signal handler that strikes there leaves them
locked, for the thread that serves all streams of the channel too: every later call would hang. And gRPC's core does not
survive a fork that meets it at work. So RPCs are made in threads that run no signal handlers, forks wait for RPCs under
way, and a forked child opens a channel of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

import grpc

from deconvd.errors import DeadlineError, DeconvdError
from deconvd.forks import UnforkedWork, begin_anew_in_children, leave_to_parent, new_lock
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.deadline import Deadline
from deconvd_client.hold import Hold
from deconvd_client.uninterrupted import call_uninterrupted, do_beside

__all__ = ["Metadata", "Rpcs"]

_T = TypeVar("_T")

_GRACE_S: Final = 0.5
"""How much longer than its deadline a call may take before gRPC is thought to be broken."""

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


class Rpcs:
    """Makes RPCs by their paths, on messages as bytes. Thread-safe.

    Its methods raise grpc.RpcError, and ValueError once it is closed.

    Args:
        open_channel: Called at the first need, and once more in a forked child.
    """

    def __init__(self, open_channel: Callable[[], grpc.Channel]) -> None:
        self._open_channel = open_channel
        self._lock = new_lock()
        self._is_closed = False
        self._channel: grpc.Channel | None = None
        begin_anew_in_children(self)

    def begin_anew_in_child(self) -> None:
        """Have no channel: what the parent's is in the midst of stays so for ever."""
        leave_to_parent(self._channel)
        self._channel = None

    def unary(self, path: str, request: bytes, deadline: Deadline) -> tuple[bytes, Metadata]:
        """Return the response to one message, and the metadata that came after it."""

        def work() -> tuple[bytes, Metadata]:
            rpc: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._opened().unary_unary(path)
            response, ended = rpc.with_call(request, timeout=deadline.remaining_s())
            return response, ended.trailing_metadata()

        return self._call(work, deadline)

    def stream(
        self,
        path: str,
        requests: Iterator[bytes],
        receive: Callable[[Iterator[bytes]], _T],
        deadline: Deadline,
    ) -> tuple[_T, Metadata]:
        """Return what `receive`, called in another thread, makes of the responses, and the metadata after them."""
        end = _End()

        def work() -> tuple[_T, Metadata]:
            rpc: grpc.StreamStreamMultiCallable[bytes, bytes] = self._opened().stream_stream(path)
            responses = rpc(requests, timeout=deadline.remaining_s())
            end.may_cancel(responses)
            try:
                return receive(responses), responses.trailing_metadata()
            finally:
                responses.cancel()  # no effect on a call that has ended

        return self._call(work, deadline, end.cancel)

    def hold(self, path: str, opening: pb.HoldSessionRequest, deadline: Deadline) -> Hold:
        """Begin a call that stays open; return once the server has answered its first message."""

        def work() -> Hold:
            return Hold.open(self._opened().stream_stream(path), opening, deadline.remaining_s())

        return self._call(work, deadline)

    def close(self, deadline: Deadline) -> None:
        """Close the channel. Calls under way end.

        Args:
            deadline: When to return, although the other end takes nothing any more.
        """
        self._is_closed = True
        channel = self._channel
        if channel is None:
            return
        closed: SimpleQueue[None] = SimpleQueue()
        # gRPC ends the calls at once, but then waits for what is being written, if need be for ever
        do_beside(lambda: closed.put(channel.close()))
        with suppress(Empty):
            closed.get(timeout=deadline.remaining_s())

    def _call(
        self,
        work: Callable[[], _T],
        deadline: Deadline,
        give_up: Callable[[], object] = lambda: None,
    ) -> _T:
        """Make a call, and end it if gRPC does not end it at its deadline.

        gRPC's unary calls return once all is written that was written together with them: never, while
        the server takes nothing. And its core may have been at work when this process was forked.
        """

        def unforked() -> _T:
            with UnforkedWork():
                return work()

        try:
            return call_uninterrupted(unforked, give_up, deadline.remaining_s() + _GRACE_S)
        except TimeoutError as error:
            if isinstance(error, DeconvdError) or deadline.remaining_s():
                raise
            raise DeadlineError("gRPC did not end the call in time") from None

    def _opened(self) -> grpc.Channel:
        with self._lock:
            if self._channel is None:
                if self._is_closed:
                    raise ValueError("the channel is closed")
                self._channel = self._open_channel()
            return self._channel


class _End:
    """The end of a call that its caller may give up before it has begun."""

    def __init__(self) -> None:
        self._call: Any = None
        self._is_given_up = False

    def may_cancel(self, call: grpc.Call) -> None:
        """Cancel a call when it is given up."""
        self._call = call
        if self._is_given_up:
            call.cancel()

    def cancel(self) -> None:
        """Give the call up."""
        self._is_given_up = True
        if self._call is not None:
            self._call.cancel()
