"""The thread that holds a session: it sends heartbeats, resumes a broken stream, and drops unused residents."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.errors import DeconvdError, LostSessionError, NotFoundError
from deconvd.host.forks import new_lock
from deconvd.host.system import MAX_TIMEOUT_S
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.calls.deadline import Deadline
from deconvd_client.calls.uninterrupted import Promise, run_in_background
from deconvd_client.transports.route import Route
from deconvd_client.transports.session_stream import SessionStream
from deconvd_client.transports.stub import Stub

__all__ = [
    "CommandQueue",
    "DropTensor",
    "FlushDrops",
    "OpenSession",
    "SessionInfo",
    "SessionThread",
    "SessionThreadState",
]

_HEARTBEATS_PER_LEASE: Final = 3
"""One or two heartbeats can be late or lost before the lease ends."""

_RESUME_PAUSE_S: Final = 0.1
"""Pause after the first failed attempt to resume a session. It doubles after each further one."""

_MAX_RESUME_PAUSE_S: Final = 1.0

_RESUME_TIMEOUT_S: Final = 5.0
"""How long one attempt to resume a session may take."""

_DROPS_PER_CALL: Final = 4096

_DROP_DELAY_S: Final = 0.05
"""How long drops are collected before they are sent, so that they do not disturb a series of short calls."""

_URGENT_DROP_BYTES: Final = 32 << 20
"""Drops of this total size are sent at once: the server may soon need the room."""

_DROP_TIMEOUT_S: Final = 5.0
"""How long one call that drops residents may take."""

_DROP_RETRY_S: Final = 1.0
"""When drops that failed are sent again."""

_END_TIMEOUT_S: Final = 0.5
"""How long the server may take to confirm the end of a session."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session that the server has opened.

    Attributes:
        name: The session's name. It is a secret, because it gives access to the residents.
        quota_bytes: Limit on the total size of its residents.
        can_remember: Whether the server remembers operands by their content.
    """

    name: bytes
    quota_bytes: int
    can_remember: bool


@dataclass(frozen=True, slots=True)
class DropTensor:
    """Command: drop a resident. It has no effect if its session has ended."""

    session: bytes
    resident: pb.Resident
    size_bytes: int


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Command: fulfil the promise with the open session; open one first if none is.

    Attributes:
        deadline: When to give up.
        fail_fast: Whether to try only once.
    """

    promise: Promise[SessionInfo]
    deadline: Deadline
    fail_fast: bool


@dataclass(frozen=True, slots=True)
class FlushDrops:
    """Command: send all drops that came before it, then fulfil the promise."""

    promise: Promise[None]


@dataclass(frozen=True, slots=True)
class _StreamEnded:
    """Event: a stream has ended. gRPC reports it in a thread of its own."""

    stream: SessionStream


class _EndSession:
    """Command: end the session and the thread."""


SessionCommand = DropTensor | OpenSession | FlushDrops | _StreamEnded | _EndSession

CommandQueue = SimpleQueue[SessionCommand]
"""The commands for the thread. `SimpleQueue.put` is reentrant, so finalizers can call it in any thread."""


class SessionThreadState(Enum):
    """The state of the session that a thread holds.

    NONE --a caller needs one--> OPEN --its stream breaks--> BROKEN --resumed--> OPEN
    OPEN or BROKEN --the server does not know it--> LOST --the thread leaves its stream--> NONE
    BROKEN --its lease ends--> LOST
    LOST --it was being resumed at that moment--> OPEN
    any of them --`end`--> ENDED
    """

    NONE = "none"
    OPEN = "open"
    BROKEN = "broken"
    """The server keeps it until its lease ends. Calls still use it, and the thread tries to resume it."""

    LOST = "lost"
    """Calls need a new one. Any thread can find this out; the session thread then leaves the stream."""

    ENDED = "ended"


class SessionThread:
    """Holds one session at a time.

        any thread                                 the session thread
        ----------                                 ------------------
        ClientSession: OpenSession, FlushDrops ->
        finalizers of handles: DropTensor      ->  commands -> _run -> HoldSession stream: heartbeats
        gRPC: _StreamEnded                     ->                   -> DropTensors calls
        `lose`: changes the state directly, under the lock

    It has no reference to its ClientSession, so that it ends after the ClientSession is garbage-collected.

    Attributes:
        commands: What the thread will do next.
        state: See `SessionThreadState`.
        session: The session while it is OPEN or BROKEN, else None.

    Args:
        route: Leads to the server.
        tenant_key: As in HoldSessionRequest.
    """

    def __init__(self, route: Route, tenant_key: bytes) -> None:
        self.commands: CommandQueue = SimpleQueue()
        self._route = route
        self._tenant_key = tenant_key
        self._thread_lock = threading.Lock()  # held by the thread for as long as it runs
        self._end_signal: SimpleQueue[None] = SimpleQueue()
        self._lock = new_lock()  # guards state, session and _stream, which only `_move` changes
        self.state: SessionThreadState = SessionThreadState.NONE
        self.session: SessionInfo | None = None
        self._stream: SessionStream | None = (
            None  # while OPEN; while LOST, until the thread leaves it
        )
        self._lease_s = 0.0
        self._due_s = 0.0  # time of the next heartbeat, or of the next attempt to resume
        self._lease_end_s = 0.0  # when a broken session is given up
        self._pause_s = 0.0
        self._drops: list[pb.Resident] = []
        self._drops_due_s = math.inf
        self._drops_bytes = 0

    def start(self) -> None:
        """Run the thread if it is not running. It does not keep the process alive."""
        if not self._thread_lock.locked():
            run_in_background(self._run_exclusively)

    def await_end(self, deadline: Deadline) -> None:
        """Return when the thread has ended, or at the deadline."""
        with suppress(Empty):
            if self._thread_lock.locked():
                self._end_signal.get(timeout=deadline.remaining_s())

    def end(self) -> None:
        """Tell the thread to end the session and itself. Finalizers call this, so it only puts a command."""
        self.commands.put(_EndSession())

    def lose(self, name: bytes) -> None:
        """Note that the server does not know the session of that name. Any thread may call this."""
        with self._lock:
            if self.session is not None and self.session.name == name:
                self._move(SessionThreadState.LOST, stream=self._stream)

    def _move(
        self,
        to: SessionThreadState,
        *,
        session: SessionInfo | None = None,
        stream: SessionStream | None = None,
    ) -> None:
        """Change the state, with the session and the stream that belong to it. The caller holds the lock."""
        self.state, self.session, self._stream = to, session, stream

    # All methods below run in the session thread.

    def _run_exclusively(self) -> None:
        # `start` may have been called twice before the first thread had the lock
        if self._thread_lock.acquire(blocking=False):
            try:
                self._run()
            finally:
                self._thread_lock.release()
                self._end_signal.put(None)

    def _run(self) -> None:
        while self.state is not SessionThreadState.ENDED:
            command = self._next_command()
            if command is not None:
                self._execute(command)
            if time.monotonic() >= self._due_s:
                self._renew()
            if time.monotonic() >= self._drops_due_s:
                self._send_drops()
            if self.state is SessionThreadState.LOST:
                self._leave_session()

    def _next_command(self) -> SessionCommand | None:
        """Wait for a command. Return None when a heartbeat, an attempt to resume or drops are due first."""
        if self.state is SessionThreadState.NONE:
            return self.commands.get()
        due_s = min(self._due_s, self._drops_due_s)
        try:
            return self.commands.get(timeout=max(due_s - time.monotonic(), 0))
        except Empty:
            return None

    def _execute(self, command: SessionCommand) -> None:
        match command:
            case DropTensor():
                self._queue_drop(command)
            case OpenSession():
                self._execute_open(command)
            case FlushDrops(promise):
                self._send_drops()
                promise.fulfil(None)
            case _StreamEnded(stream):
                self._note_end(stream)
            case _EndSession():
                self._end_session()

    def _execute_open(self, command: OpenSession) -> None:
        try:
            session = self.session
            if session is None:
                if self.state is SessionThreadState.LOST:
                    self._leave_session()
                session = self._open(b"", command.deadline, fail_fast=command.fail_fast)
            command.promise.fulfil(session)
        except Exception as error:  # noqa: BLE001 - whatever it is, the waiting caller raises it
            command.promise.fail(error)

    def _open(self, name: bytes, deadline: Deadline, *, fail_fast: bool) -> SessionInfo:
        """Resume the session of that name; open a new one if the name is empty."""
        request = pb.HoldSessionRequest(session=name, tenant_key=self._tenant_key)

        def open_stream(stub: Stub) -> SessionStream:
            return stub.hold_session(request, deadline)

        call = self._route.call_once if fail_fast else self._route.call
        stream = call(open_stream, deadline)
        response = stream.response
        session = SessionInfo(response.session, response.quota_bytes, response.can_remember)
        # in this order, `min` also bounds a lease that is not a number
        self._lease_s = min(MAX_TIMEOUT_S, stream.response.lease_s)
        self._due_s = time.monotonic() + self._lease_s / _HEARTBEATS_PER_LEASE
        with self._lock:
            self._move(SessionThreadState.OPEN, session=session, stream=stream)
        commands = self.commands  # the callback must not refer to this object
        stream.add_done_callback(lambda: commands.put(_StreamEnded(stream)))
        return session

    def _note_end(self, stream: SessionStream) -> None:
        """Start to resume the session if it was its stream that has ended. Older streams do not matter."""
        with self._lock:
            if self.state is not SessionThreadState.OPEN or stream is not self._stream:
                return
            self._move(SessionThreadState.BROKEN, session=self.session)
        stream.cancel()
        self._pause_s = 0.0
        self._due_s = time.monotonic()
        self._lease_end_s = self._due_s + self._lease_s

    def _renew(self) -> None:
        """Send a heartbeat, or try to resume a broken session."""
        with self._lock:
            session, stream = self.session, self._stream
        if stream is not None:
            stream.send_heartbeat()
            self._due_s = time.monotonic() + self._lease_s / _HEARTBEATS_PER_LEASE
        elif session is not None:
            self._resume(session)

    def _resume(self, session: SessionInfo) -> None:
        """Try once to resume a broken session. Give it up if its lease has ended."""
        try:
            self._open(session.name, Deadline(_RESUME_TIMEOUT_S), fail_fast=True)
        except NotFoundError as error:
            self._give_up(session, error)
        except DeconvdError as error:
            if time.monotonic() >= self._lease_end_s:
                self._give_up(session, error)
            self._pause_s = min(max(2 * self._pause_s, _RESUME_PAUSE_S), _MAX_RESUME_PAUSE_S)
            self._due_s = time.monotonic() + self._pause_s

    def _give_up(self, session: SessionInfo, error: DeconvdError) -> None:
        _log.info(
            "the session was lost; its tensors are sent again when they are next used: %s", error
        )
        self.lose(session.name)

    def _leave_session(self) -> None:
        """Cancel the stream of a lost session. The drops for it are pointless now."""
        self._clear_drops()
        with self._lock:
            stream = self._stream
            self._move(SessionThreadState.NONE)
        if stream is not None:
            stream.cancel()

    def _queue_drop(self, drop: DropTensor) -> None:
        if self.session is None or self.session.name != drop.session:
            return  # the server dropped it with its session
        self._drops.append(drop.resident)
        self._drops_bytes += drop.size_bytes
        now_s = time.monotonic()
        delay_s = _DROP_DELAY_S if self._drops_bytes < _URGENT_DROP_BYTES else 0.0
        self._drops_due_s = min(self._drops_due_s, now_s + delay_s)

    def _send_drops(self) -> None:
        """Send all queued drops. Those that fail stay in the queue, and are sent again later."""
        while self._drops and (session := self.session) is not None:
            batch = self._drops[:_DROPS_PER_CALL]
            request = pb.DropTensorsRequest(session=session.name, residents=batch)
            deadline = Deadline(_DROP_TIMEOUT_S)
            drop = partial(Stub.drop_tensors, request=request, deadline=deadline)
            try:
                self._route.call_once(drop, deadline)
            except LostSessionError:
                self.lose(session.name)
            except DeconvdError as error:
                _log.debug("%d tensors could not be dropped, trying again: %s", len(batch), error)
                self._drops_due_s = time.monotonic() + _DROP_RETRY_S
                return
            del self._drops[: len(batch)]
        self._clear_drops()

    def _clear_drops(self) -> None:
        self._drops.clear()
        self._drops_due_s, self._drops_bytes = math.inf, 0

    def _end_session(self) -> None:
        """End the session and the thread. Give the server a moment to confirm: then it has dropped all residents."""
        with self._lock:
            stream = self._stream
            self._move(SessionThreadState.ENDED)
        if stream is None:
            return
        confirmed = threading.Event()
        stream.add_done_callback(confirmed.set)
        stream.close()
        if not confirmed.wait(_END_TIMEOUT_S):
            stream.cancel()
