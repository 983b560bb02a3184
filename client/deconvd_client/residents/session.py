"""The session of a connection: the server keeps the connection's residents for as long as the session lives."""

from __future__ import annotations

from typing import TypeVar

from deconvd.errors import CallCancelledError, DeadlineError
from deconvd.host.forks import leave_to_parent, new_lock, register_fork_reset
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.cancel_scope import fail_on_cancel
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import Promise, PromiseTimeoutError
from deconvd_client.residents.session_thread import (
    CommandQueue,
    DropTensor,
    FlushDrops,
    OpenSession,
    SessionInfo,
    SessionThread,
)
from deconvd_client.transports.retry_policy import ForkedChildError
from deconvd_client.transports.route import Route

__all__ = ["ClientSession", "ResidentHandle"]

_T = TypeVar("_T")


class ResidentHandle:
    """Names a resident in requests. The server drops the tensor after the last reference to this is gone.

    Attributes:
        session: The name of the session that keeps the tensor.
        resident: The name of the tensor.
    """

    __slots__ = ("_commands", "_size_bytes", "resident", "session")

    def __init__(
        self, session: bytes, resident: pb.Resident, size_bytes: int, commands: CommandQueue
    ) -> None:
        self.session: bytes = session
        self.resident: pb.Resident = resident
        self._size_bytes = size_bytes
        self._commands = commands

    def __del__(self) -> None:
        # A finalizer runs in any thread, with any locks held, so it may only put a command into the queue.
        self._commands.put(DropTensor(self.session, self.resident, self._size_bytes))


class ClientSession:
    """Opens a session at the first need, and a new one after the server has lost it. Thread-safe.

    A forked child cannot have a session: the residents are its parent's, and gRPC's streams do not survive a fork.

    Args:
        route: Leads to the server.
        tenant_key: As in HoldSessionRequest.
    """

    def __init__(self, route: Route, tenant_key: bytes) -> None:
        self._route = route
        self._tenant_key = tenant_key
        self._is_closed = False
        self._is_in_child = False
        self._lock = new_lock()
        self._create_thread()
        register_fork_reset(self)

    def open(self, deadline: Deadline, *, fail_fast: bool = False) -> SessionInfo:
        """Return the open session, or open one.

        Args:
            deadline: When to give up.
            fail_fast: Whether to try only once.

        Raises:
            DeconvdError: The session could not be opened.
        """
        session = self.current
        if session is not None:
            return session
        promise: Promise[SessionInfo] = Promise()
        self._submit(OpenSession(promise, deadline.shield(), fail_fast))
        return _wait_for(deadline, promise, "open a session")

    @property
    def current(self) -> SessionInfo | None:
        """The open session, if there is one. The server may have ended it without the client knowing yet."""
        return self._thread.session

    @property
    def is_shared(self) -> bool:
        """Whether other connections may be of the same tenant."""
        return bool(self._tenant_key)

    @property
    def name(self) -> bytes:
        """The name of the open session. Empty if none is open."""
        session = self.current
        return b"" if session is None else session.name

    def lose(self, name: bytes) -> None:
        """Note that the server does not know the session of that name."""
        self._thread.lose(name)

    def make_handle(self, session: bytes, resident: pb.Resident, size_bytes: int) -> ResidentHandle:
        """Return the handle of a tensor that the server has just kept."""
        return ResidentHandle(session, resident, size_bytes, self._thread.commands)

    def flush(self, deadline: Deadline) -> None:
        """Return after the server has dropped all residents that nobody uses."""
        promise: Promise[None] = Promise()
        self._submit(FlushDrops(promise))
        _wait_for(deadline, promise, "drop tensors that nobody uses")

    def close(self, deadline: Deadline) -> None:
        """End the session for good. Return when the server has confirmed it, or at the deadline."""
        with self._lock:
            self._is_closed = True
            self._thread.end()
        self._thread.await_end(deadline)

    def reset_after_fork(self) -> None:
        """Leave the session to the parent, and refuse commands from now on."""
        self._is_in_child = True
        leave_to_parent(self._thread)
        self._create_thread()

    def _create_thread(self) -> None:
        self._thread = SessionThread(self._route, self._tenant_key)

    def _submit(self, command: OpenSession | FlushDrops) -> None:
        with self._lock:  # so that no command follows the one that ends the thread
            if self._is_closed:
                raise CallCancelledError("the connection is closed")
            if self._is_in_child:
                raise ForkedChildError(
                    "a forked child cannot keep tensors on the server through its parent's connection: "
                    "call deconvd_client.connect() in the child"
                )
            self._thread.start()
            self._thread.commands.put(command)

    def __del__(self) -> None:
        self._thread.end()


def _wait_for(deadline: Deadline, promise: Promise[_T], action: str) -> _T:
    """Return the value that the session's thread gives.

    Raises:
        DeadlineError: It gave none before the deadline.
        CallCancelledError: The call was cancelled.
    """
    try:
        with fail_on_cancel(deadline.scope, promise.fail):
            return promise.wait(deadline.remaining_s())
    except PromiseTimeoutError:
        raise DeadlineError(
            f"the server did not {action} within {deadline.timeout_s:g} s: "
            "raise timeout_s of connect(), or --timeout-s of the command"
        ) from None
