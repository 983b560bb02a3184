"""The session of a connection: what the server keeps for it is kept for as long as this is in use."""

from __future__ import annotations

from typing import TypeVar

from deconvd.errors import CallCancelledError, DeadlineError, UnavailableError
from deconvd.host.forks import leave_to_parent, new_lock, register_fork_reset
from deconvd.v1 import deconvd_pb2 as pb
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
from deconvd_client.transports.route import Route

__all__ = ["ClientSession", "ResidentHandle"]

_T = TypeVar("_T")


class ResidentHandle:
    """A tensor that the server keeps, until the last that refers to this has gone.

    Attributes:
        session: The name of the session that it is kept for.
        resident: The tensor.
    """

    __slots__ = ("_commands", "_size_bytes", "resident", "session")

    def __init__(
        self, session: bytes, resident: pb.Resident, size_bytes: int, mailbox: CommandQueue
    ) -> None:
        self.session: bytes = session
        self.resident: pb.Resident = resident
        self._size_bytes = size_bytes
        self._commands = mailbox

    def __del__(self) -> None:
        # Whatever thread this is, and whatever locks it holds: no more than this may happen here.
        self._commands.put(DropTensor(self.session, self.resident, self._size_bytes))


class ClientSession:
    """Opened at the first need, and anew when the server knows it no more. Thread-safe.

    A forked child has none, and can have none: what its parent keeps is the parent's, and gRPC's
    streams do not survive a fork.

    Args:
        nearest: The ways to the server.
        tenant_key: As in HoldSessionRequest.
    """

    def __init__(self, nearest: Route, tenant_key: bytes) -> None:
        self._route = nearest
        self._tenant_key = tenant_key
        self._is_closed = False
        self._is_in_child = False
        self._lock = new_lock()
        self._create_thread()
        register_fork_reset(self)

    def open(self, deadline: Deadline, *, fail_fast: bool = False) -> SessionInfo:
        """Return the session, after opening it if need be. Raises a DeconvdError.

        Args:
            deadline: Until when to try.
            fail_fast: Whether to try once.
        """
        opened = self._thread.session
        if opened is not None:
            return opened
        answer: Promise[SessionInfo] = Promise()
        self._submit(OpenSession(answer, deadline, fail_fast))
        return _wait_for(deadline, answer, "open a session")

    @property
    def is_open(self) -> bool:
        """Whether it is open now, as far as is known."""
        return self._thread.session is not None

    @property
    def name(self) -> bytes:
        """Its name, if it is open now, as far as is known; else empty."""
        opened = self._thread.session
        return b"" if opened is None else opened.name

    def lose(self, name: bytes) -> None:
        """Take note that the server does not know the session of that name."""
        self._thread.lose(name)

    def make_handle(self, session: bytes, resident: pb.Resident, size_bytes: int) -> ResidentHandle:
        """Return the handle of a tensor that the server keeps from now on."""
        return ResidentHandle(session, resident, size_bytes, self._thread.commands)

    def flush(self, deadline: Deadline) -> None:
        """Return once the server has been told of all that is to be dropped."""
        answer: Promise[None] = Promise()
        self._submit(FlushDrops(answer))
        _wait_for(deadline, answer, "drop tensors that nobody uses")

    def close(self, deadline: Deadline) -> None:
        """End it, for good: return once the server has taken note, or at the deadline."""
        with self._lock:
            self._is_closed = True
            self._thread.end()
        self._thread.await_end(deadline)

    def reset_after_fork(self) -> None:
        """Have nothing to do with the session, which is the parent's."""
        self._is_in_child = True
        leave_to_parent(self._thread)
        self._create_thread()

    def _create_thread(self) -> None:
        self._thread = SessionThread(self._route, self._tenant_key)

    def _submit(self, wish: OpenSession | FlushDrops) -> None:
        with self._lock:  # so that no wish comes after the end
            if self._is_closed:
                raise CallCancelledError("the connection is closed")
            if self._is_in_child:
                raise UnavailableError(
                    "tensors stay for the process that made the connection: a forked child must "
                    "make one of its own"
                )
            self._thread.start()
            self._thread.commands.put(wish)

    def __del__(self) -> None:
        self._thread.end()


def _wait_for(deadline: Deadline, answer: Promise[_T], what: str) -> _T:
    """Return what the session's thread answers. Raises DeadlineError if it does not in time."""
    try:
        return answer.wait(deadline.remaining_s())
    except PromiseTimeoutError:
        raise DeadlineError(f"the server did not {what} in time") from None
