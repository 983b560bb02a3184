"""RPCs of a gRPC channel that survive interrupts, forks and servers that hang.

* Interrupts. gRPC's Python code holds locks while it works. An exception from a signal handler there would leave them
  locked, also for the thread that serves all streams of the channel, and every later call would hang. So RPCs are made
  in threads that run no signal handlers.
* Forks. gRPC's core does not survive a fork in the middle of its work. So a fork waits for the RPCs under way, and a
  forked child opens a channel of its own.
* Credentials that change. Each call carries the token of its moment. A channel goes on with the certificates that it
  was opened with, until it breaks, or the server no longer takes them: if the files of TLS have changed by then, it is
  replaced.
* Servers that hang. gRPC's core does not end a call while bytes of it wait to be written, whatever its deadline: with a
  stopped server, never. So a caller stops waiting a little after the deadline, and later calls use a new channel.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, TypeAlias, TypeVar, cast

import grpc

from deconvd.errors import CallCancelledError, DeadlineError, UnavailableError
from deconvd.host.forks import ForkBlocker, leave_to_parent, new_lock, register_fork_reset
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import (
    BackgroundTask,
    PromiseTimeoutError,
    run_in_background,
)
from deconvd_client.credentials import NO_CREDENTIALS, ClientTlsState, Credentials
from deconvd_client.transports.grpc.core import core_channel
from deconvd_client.transports.grpc.stream_rpc import StreamRpc
from deconvd_client.transports.session_stream import SessionStream

__all__ = ["Metadata", "RpcChannel"]

_T = TypeVar("_T")

_DEADLINE_GRACE_S: Final = 0.5
"""If a call takes this much longer than its deadline, its channel is considered broken."""

Metadata: TypeAlias = Iterable[tuple[str, str | bytes]]


class _OutdatedChannelError(UnavailableError):
    """The channel is of no more use, and its certificates are old: the next call uses another."""


class RpcChannel:
    """Makes RPCs by their paths, with messages as bytes. Thread-safe.

    Its methods raise grpc.RpcError; DeadlineError if gRPC does not end a call in time; UnavailableError if a channel
    was replaced since its certificates are old; ValueError after `close`.

    Args:
        open_channel: Called for the first RPC, for the first in a forked child, and after a channel has broken.
        credentials: Those that `open_channel` uses, and whose token the calls carry.
    """

    def __init__(
        self, open_channel: Callable[[], grpc.Channel], credentials: Credentials = NO_CREDENTIALS
    ) -> None:
        self._open_channel = open_channel
        self._credentials = credentials
        self._tls_state: ClientTlsState | None = None  # that of the channel
        self._lock = new_lock()
        self._is_closed = False
        self._channel: grpc.Channel | None = None
        self._running_tasks: set[BackgroundTask[Any]] = set()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Drop the channel in a forked child: its threads are in the parent, so its calls would never end."""
        leave_to_parent(self._channel)
        self._channel = None
        self._running_tasks = set()

    def unary(self, path: str, request: bytes, deadline: Deadline) -> tuple[bytes, Metadata]:
        """Make an RPC of one message; return the response and the trailing metadata."""
        cancellation = _Cancellation()

        def work(channel: grpc.Channel) -> tuple[bytes, Metadata]:
            rpc: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
            timeout_s, metadata = deadline.remaining_s(), self._credentials.metadata()
            if deadline.scope is None:
                response, ended = rpc.with_call(request, timeout=timeout_s, metadata=metadata)
                return response, ended.trailing_metadata()
            # slower, as another thread takes gRPC's events, but only this call can be cancelled
            call = rpc.future(request, timeout=timeout_s, metadata=metadata)
            cancellation.attach(call)
            return call.result(), call.trailing_metadata()

        try:
            return self._call(work, deadline, cancellation.cancel)
        except _OutdatedChannelError:  # also for those who ask once, as for the server's health
            return self._call(work, deadline, cancellation.cancel)

    def stream(
        self,
        path: str,
        requests: Iterator[bytes],
        receive: Callable[[Iterator[bytes]], _T],
        deadline: Deadline,
    ) -> tuple[_T, Metadata]:
        """Make a streaming RPC; return what `receive` returns, and the trailing metadata.

        Args:
            requests: The messages to send.
            receive: Reads the responses, in another thread.
        """
        cancellation = _Cancellation()

        def work(channel: grpc.Channel) -> tuple[_T, Metadata]:
            core = core_channel(channel)
            if core is None:
                return work_in_three_threads(channel)
            timeout_s = deadline.remaining_s()
            metadata = self._credentials.metadata()
            with closing(StreamRpc(core, path, requests, timeout_s, metadata)) as call:
                cancellation.attach(call)
                return receive(call), call.finish()

        def work_in_three_threads(channel: grpc.Channel) -> tuple[_T, Metadata]:
            rpc: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
            metadata = self._credentials.metadata()
            responses = rpc(requests, timeout=deadline.remaining_s(), metadata=metadata)
            cancellation.attach(responses)
            try:
                return receive(responses), responses.trailing_metadata()
            finally:
                responses.cancel()  # no effect on a call that has ended

        return self._call(work, deadline, cancellation.cancel)

    def open_session(
        self, path: str, opening: pb.HoldSessionRequest, deadline: Deadline
    ) -> SessionStream:
        """Start a HoldSession call; return once the server has answered its first message."""

        def work(channel: grpc.Channel) -> SessionStream:
            rpc: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(path)
            metadata = self._credentials.metadata()
            return SessionStream.open(rpc, opening, deadline.remaining_s(), metadata)

        return self._call(work, deadline)

    def close(self, deadline: Deadline) -> None:
        """Close the channel. Calls under way end.

        Args:
            deadline: When to return, even if the server no longer reads.
        """
        self._is_closed = True
        channel = self._channel
        if channel is None:
            return
        closed: SimpleQueue[None] = SimpleQueue()
        # gRPC ends the calls at once, but then waits for bytes that are being written, perhaps for ever
        run_in_background(lambda: closed.put(channel.close()))
        with suppress(Empty):
            closed.get(timeout=deadline.remaining_s())
        for task in [*self._running_tasks]:  # those that gRPC has not ended
            task.fail(CallCancelledError("the connection is closed"))

    def _call(
        self,
        work: Callable[[grpc.Channel], _T],
        deadline: Deadline,
        give_up: Callable[[], object] = lambda: None,
    ) -> _T:
        """Run `work` in another thread. Wait until a little after the deadline: gRPC should end the call by then."""
        used: list[grpc.Channel] = []

        def run_unforked() -> _T:
            running_tasks = self._running_tasks
            running_tasks.add(task)
            try:
                with ForkBlocker():
                    channel = self._get_channel()
                    used.append(channel)
                    return work(channel)
            except grpc.RpcError as error:
                if used and self._replace_outdated(used[0], error):
                    raise _OutdatedChannelError(
                        "the certificates have changed: a new channel is opened", retry_after_s=0.0
                    ) from None
                raise
            except ValueError:
                if self._is_closed or self._channel in used:
                    raise
                raise CallCancelledError("the channel was replaced meanwhile") from None
            finally:
                running_tasks.discard(task)

        task = BackgroundTask(run_unforked)
        try:
            return task.run(give_up, deadline.remaining_s() + _DEADLINE_GRACE_S, deadline.scope)
        except PromiseTimeoutError:
            self._abandon_channel(used)
            raise DeadlineError("gRPC has not ended the call in time") from None

    def _abandon_channel(self, used: Collection[grpc.Channel]) -> None:
        """Close a channel that does not end its calls, so that later calls open a new one."""
        with self._lock:
            channel = self._channel
            if channel is None or channel not in used:
                return
            self._channel = None
        run_in_background(channel.close)  # its other calls are cancelled, to be made again

    def _replace_outdated(self, channel: grpc.Channel, error: grpc.RpcError) -> bool:
        """Return whether later calls use another channel than the one that failed, since its certificates are old."""
        if self._credentials.tls is None or not (_has_broken(error) or _is_unauthenticated(error)):
            return False
        state = self._credentials.fresh_tls_state()
        if channel is self._channel and state is self._tls_state:
            return False
        self._abandon_channel([channel])
        return True

    def _get_channel(self) -> grpc.Channel:
        with self._lock:
            if self._channel is None:
                if self._is_closed:
                    raise ValueError("the channel is closed")
                self._tls_state = self._credentials.tls_state
                self._channel = self._open_channel()
            return self._channel


def _has_broken(error: grpc.RpcError) -> bool:
    """Return whether a call failed since its channel has no connection: no server has answered then."""
    call = cast("grpc.Call", error)
    return call.code() is grpc.StatusCode.UNAVAILABLE and not call.trailing_metadata()


def _is_unauthenticated(error: grpc.RpcError) -> bool:
    """Return whether the server does not know the caller, as when the certificate of the connection has ended."""
    return cast("grpc.Call", error).code() is grpc.StatusCode.UNAUTHENTICATED


class _Cancellation:
    """Cancels a call, also one that has not begun when its caller gives up."""

    def __init__(self) -> None:
        self._call: Any = None
        self._is_given_up = False

    def attach(self, call: grpc.Call | StreamRpc) -> None:
        """Set the call to cancel; cancel it at once if the caller has given up already."""
        self._call = call
        if self._is_given_up:
            call.cancel()

    def cancel(self) -> None:
        """Cancel the call, now or when it begins."""
        self._is_given_up = True
        if self._call is not None:
            self._call.cancel()
