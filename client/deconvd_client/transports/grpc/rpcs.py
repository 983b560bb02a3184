"""RPCs of a gRPC channel, made where no interrupt strikes, on a channel of this very process.

gRPC's Python holds locks of its own while it works. An exception from a signal handler that strikes there leaves them
locked, for the thread that serves all streams of the channel too: every later call would hang. And gRPC's core does not
survive a fork that meets it at work. So RPCs are made in threads that run no signal handlers, forks wait for RPCs under
way, and a forked child opens a channel of its own.

Nor does gRPC's core end a call, whatever its deadline, while the call's bytes wait to be written: that is for ever if
the server is stopped. So whoever waits for an RPC leaves it a little after its deadline, and later ones go by a new
channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar

import grpc

from deconvd.errors import CallCancelledError, DeadlineError
from deconvd.host.forks import ForkBlocker, leave_to_parent, new_lock, register_fork_reset
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import (
    BackgroundTask,
    PromiseTimeoutError,
    run_in_background,
)
from deconvd_client.transports.session_stream import SessionStream

__all__ = ["Metadata", "RpcChannel"]

_T = TypeVar("_T")

_DEADLINE_GRACE_S: Final = 0.5
"""How much longer than its deadline a call may take before its channel is thought to be of no more use."""

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


class RpcChannel:
    """Makes RPCs by their paths, on messages as bytes. Thread-safe.

    Its methods raise grpc.RpcError, and ValueError once it is closed.

    Args:
        open_channel: Called at the first need, in a forked child, and after a channel was of no more use.
    """

    def __init__(self, open_channel: Callable[[], grpc.Channel]) -> None:
        self._open_channel = open_channel
        self._lock = new_lock()
        self._is_closed = False
        self._channel: grpc.Channel | None = None
        self._running_tasks: set[BackgroundTask[Any]] = set()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Have no channel: what the parent's is in the midst of stays so for ever."""
        leave_to_parent(self._channel)
        self._channel = None
        self._running_tasks = set()

    def unary(self, path: str, request: bytes, deadline: Deadline) -> tuple[bytes, Metadata]:
        """Return the response to one message, and the metadata that came after it."""

        def work(channel: grpc.Channel) -> tuple[bytes, Metadata]:
            rpc: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
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
        end = _Cancellation()

        def work(channel: grpc.Channel) -> tuple[_T, Metadata]:
            rpc: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
            responses = rpc(requests, timeout=deadline.remaining_s())
            end.attach(responses)
            try:
                return receive(responses), responses.trailing_metadata()
            finally:
                responses.cancel()  # no effect on a call that has ended

        return self._call(work, deadline, end.cancel)

    def open_session(
        self, path: str, opening: pb.HoldSessionRequest, deadline: Deadline
    ) -> SessionStream:
        """Begin a call that stays open; return once the server has answered its first message."""

        def work(channel: grpc.Channel) -> SessionStream:
            return SessionStream.open(channel.stream_stream(path), opening, deadline.remaining_s())

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
        run_in_background(lambda: closed.put(channel.close()))
        with suppress(Empty):
            closed.get(timeout=deadline.remaining_s())
        for job in [*self._running_tasks]:  # those that gRPC has not ended
            job.fail(CallCancelledError("the connection is closed"))

    def _call(
        self,
        work: Callable[[grpc.Channel], _T],
        deadline: Deadline,
        give_up: Callable[[], object] = lambda: None,
    ) -> _T:
        """Make a call, and wait for it until a little after its deadline, by which gRPC ends it if it can."""
        used: list[grpc.Channel] = []

        def run_unforked() -> _T:
            under_way = self._running_tasks
            under_way.add(job)
            try:
                with ForkBlocker():
                    channel = self._get_channel()
                    used.append(channel)
                    return work(channel)
            except ValueError:
                if self._is_closed or self._channel in used:
                    raise
                raise CallCancelledError("the channel was given up meanwhile") from None
            finally:
                under_way.discard(job)

        job = BackgroundTask(run_unforked)
        try:
            return job.run(give_up, deadline.remaining_s() + _DEADLINE_GRACE_S)
        except PromiseTimeoutError:
            self._abandon_channel(used)
            raise DeadlineError("gRPC has not ended the call in time") from None

    def _abandon_channel(self, used: Collection[grpc.Channel]) -> None:
        """Let later calls go by another channel than one that does not end its calls."""
        with self._lock:
            channel = self._channel
            if channel is None or channel not in used:
                return
            self._channel = None
        run_in_background(channel.close)  # its other calls are cancelled, to be made again

    def _get_channel(self) -> grpc.Channel:
        with self._lock:
            if self._channel is None:
                if self._is_closed:
                    raise ValueError("the channel is closed")
                self._channel = self._open_channel()
            return self._channel


class _Cancellation:
    """The end of a call that its caller may give up before it has begun."""

    def __init__(self) -> None:
        self._call: Any = None
        self._is_given_up = False

    def attach(self, call: grpc.Call) -> None:
        """Cancel a call when it is given up."""
        self._call = call
        if self._is_given_up:
            call.cancel()

    def cancel(self) -> None:
        """Give the call up."""
        self._is_given_up = True
        if self._call is not None:
            self._call.cancel()
