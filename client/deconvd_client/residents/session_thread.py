"""The thread that holds a session: it gives signs of life, resumes what broke, and drops what nobody uses."""

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
_RESUME_PAUSE_S: Final = 0.1
_RESUME_LONGEST_PAUSE_S: Final = 1.0
_RESUME_TIMEOUT_S: Final = 5.0
_DROPS_PER_CALL: Final = 4096
_DROP_DELAY_S: Final = 0.05
"""For how long drops are gathered, so that they do not disturb the calls among which tensors come and go."""

_URGENT_DROP_BYTES: Final = 32 << 20
"""What is not kept waiting, since it may soon be needed."""

_DROP_TIMEOUT_S: Final = 5.0
_DROP_RETRY_S: Final = 1.0
_END_TIMEOUT_S: Final = 0.5
"""How long a server has to take note of the end of a session."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session that the server has opened.

    Attributes:
        name: The secret by which it is known.
        quota_bytes: What may be kept in it.
    """

    name: bytes
    quota_bytes: int


@dataclass(frozen=True, slots=True)
class DropTensor:
    """Wish: drop a tensor, unless its session has ended."""

    session: bytes
    resident: pb.Resident
    size_bytes: int


@dataclass(frozen=True, slots=True)
class OpenSession:
    """Wish: say which session is open, after opening one if need be.

    Attributes:
        deadline: Until when to try.
        fail_fast: Whether to try once.
    """

    promise: Promise[SessionInfo]
    deadline: Deadline
    fail_fast: bool


@dataclass(frozen=True, slots=True)
class FlushDrops:
    """Wish: say when all earlier wishes have been seen to."""

    promise: Promise[None]


@dataclass(frozen=True, slots=True)
class _StreamEnded:
    """News: a stream has ended."""

    stream: SessionStream


class _EndSession:
    """Wish: end the session, and the thread."""


SessionCommand = DropTensor | OpenSession | FlushDrops | _StreamEnded | _EndSession

CommandQueue = SimpleQueue[SessionCommand]
"""What the thread is to do. A finalizer may put something into it, wherever it happens to run."""


class SessionThreadState(Enum):
    """How a keeper stands with the server.

    NONE --asked for--> OPEN --its stream breaks--> BROKEN --resumed--> OPEN
    OPEN or BROKEN --the server does not know it--> LOST --the stream is left--> NONE
    BROKEN --its lease passes--> LOST
    LOST --it was being resumed meanwhile--> OPEN
    any of them --`end`--> ENDED
    """

    NONE = "none"
    OPEN = "open"
    BROKEN = "broken"
    """The server keeps it until its lease passes: calls use it, and the thread tries to resume it."""

    LOST = "lost"
    """Calls need another. Any thread may find that out, and the keeper's own then leaves the stream."""

    ENDED = "ended"


class SessionThread:
    """Holds one session at a time.

    It knows nothing of those who use it, so that it ends with the last of them.

    Attributes:
        mailbox: What it is to do.
        state: How it stands with the server. See `SessionState`.
        opened: The session, while it is OPEN or BROKEN, else None.

    Args:
        nearest: The ways to the server.
        tenant_key: As in HoldSessionRequest.
    """

    def __init__(self, nearest: Route, tenant_key: bytes) -> None:
        self.commands: CommandQueue = SimpleQueue()
        self._route = nearest
        self._tenant_key = tenant_key
        self._thread_lock = threading.Lock()
        self._end_signal: SimpleQueue[None] = SimpleQueue()
        self._lock = new_lock()  # of what `_move` changes
        self.state: SessionThreadState = SessionThreadState.NONE
        self.session: SessionInfo | None = None
        self._stream: SessionStream | None = None  # while it is OPEN, and in LOST until it is left
        self._lease_s = 0.0
        self._due_s = 0.0  # of the next sign of life, or the next try to resume
        self._lost_s = 0.0  # when a broken session is given up
        self._pause_s = 0.0
        self._drops: list[pb.Resident] = []
        self._drops_due_s = math.inf
        self._drops_bytes = 0

    def start(self) -> None:
        """Have a thread hold the session, if none does. It does not keep the process alive."""
        if not self._thread_lock.locked():
            run_in_background(self._run_exclusively)

    def await_end(self, deadline: Deadline) -> None:
        """Return once the thread has ended, or at the deadline."""
        with suppress(Empty):
            if self._thread_lock.locked():
                self._end_signal.get(timeout=deadline.remaining_s())

    def end(self) -> None:
        """Ask for the end of the session and of the thread."""
        self.commands.put(_EndSession())

    def lose(self, name: bytes) -> None:
        """Take note that the server does not know a session. May be called in any thread."""
        with self._lock:
            if self.session is not None and self.session.name == name:
                self._move(SessionThreadState.LOST, hold=self._stream)

    def _move(
        self,
        to: SessionThreadState,
        *,
        opened: SessionInfo | None = None,
        hold: SessionStream | None = None,
    ) -> None:
        """Change the state, and what belongs to it. Called with the lock held."""
        self.state, self.session, self._stream = to, opened, hold

    # What follows runs in the thread.

    def _run_exclusively(self) -> None:
        if self._thread_lock.acquire(
            blocking=False
        ):  # else another thread was asked at the same time
            try:
                self._run()
            finally:
                self._thread_lock.release()
                self._end_signal.put(None)

    def _run(self) -> None:
        while self.state is not SessionThreadState.ENDED:
            wish = self._next_command()
            if wish is not None:
                self._execute(wish)
            if time.monotonic() >= self._due_s:
                self._renew()
            if time.monotonic() >= self._drops_due_s:
                self._send_drops()
            if self.state is SessionThreadState.LOST:
                self._leave_session()

    def _next_command(self) -> SessionCommand | None:
        """Wait for a wish, or for the time to do something without one."""
        if self.state is SessionThreadState.NONE:
            return self.commands.get()
        due_s = min(self._due_s, self._drops_due_s)
        try:
            return self.commands.get(timeout=max(due_s - time.monotonic(), 0))
        except Empty:
            return None

    def _execute(self, wish: SessionCommand) -> None:
        match wish:
            case DropTensor():
                self._queue_drop(wish)
            case OpenSession():
                self._execute_open(wish)
            case FlushDrops(answer):
                self._send_drops()
                answer.fulfil(None)
            case _StreamEnded(hold):
                self._note_end(hold)
            case _EndSession():
                self._end_session()

    def _execute_open(self, asking: OpenSession) -> None:
        try:
            opened = self.session
            if opened is None:
                if self.state is SessionThreadState.LOST:
                    self._leave_session()
                opened = self._open(b"", asking.deadline, fail_fast=asking.fail_fast)
            asking.promise.fulfil(opened)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's
            asking.promise.fail(error)

    def _open(self, name: bytes, deadline: Deadline, *, fail_fast: bool) -> SessionInfo:
        """Open a session, or resume that of a name."""
        opening = pb.HoldSessionRequest(session=name, tenant_key=self._tenant_key)

        def open_stream(stub: Stub) -> SessionStream:
            return stub.hold_session(opening, deadline)

        call = self._route.call_once if fail_fast else self._route.call
        hold = call(open_stream, deadline)
        opened = SessionInfo(hold.response.session, hold.response.quota_bytes)
        self._lease_s = min(MAX_TIMEOUT_S, hold.response.lease_s)  # also where it is not a number
        self._due_s = time.monotonic() + self._lease_s / _HEARTBEATS_PER_LEASE
        with self._lock:
            self._move(SessionThreadState.OPEN, opened=opened, hold=hold)
        mailbox = self.commands
        hold.add_done_callback(lambda: mailbox.put(_StreamEnded(hold)))
        return opened

    def _note_end(self, hold: SessionStream) -> None:
        """Take note that a stream has ended: if it is the session's, that is to be resumed now."""
        with self._lock:
            if self.state is not SessionThreadState.OPEN or hold is not self._stream:
                return
            self._move(SessionThreadState.BROKEN, opened=self.session)
        hold.cancel()
        self._pause_s = 0.0
        self._due_s = time.monotonic()
        self._lost_s = self._due_s + self._lease_s

    def _renew(self) -> None:
        """Give a sign of life, or try to resume what is broken."""
        with self._lock:
            opened, hold = self.session, self._stream
        if hold is not None:
            hold.send_heartbeat()
            self._due_s = time.monotonic() + self._lease_s / _HEARTBEATS_PER_LEASE
        elif opened is not None:
            self._resume(opened)

    def _resume(self, opened: SessionInfo) -> None:
        """Try to open a broken session again; give it up once its lease has passed."""
        try:
            self._open(opened.name, Deadline(_RESUME_TIMEOUT_S), fail_fast=True)
        except NotFoundError as error:
            self._give_up(opened, error)
        except DeconvdError as error:
            if time.monotonic() >= self._lost_s:
                self._give_up(opened, error)
            self._pause_s = min(max(2 * self._pause_s, _RESUME_PAUSE_S), _RESUME_LONGEST_PAUSE_S)
            self._due_s = time.monotonic() + self._pause_s

    def _give_up(self, opened: SessionInfo, error: DeconvdError) -> None:
        _log.info("the session has ended, and tensors are sent again as they are used: %s", error)
        self.lose(opened.name)

    def _leave_session(self) -> None:
        """Leave a session that is no more."""
        self._clear_drops()
        with self._lock:
            hold = self._stream
            self._move(SessionThreadState.NONE)
        if hold is not None:
            hold.cancel()

    def _queue_drop(self, drop: DropTensor) -> None:
        if self.session is None or self.session.name != drop.session:
            return
        self._drops.append(drop.resident)
        self._drops_bytes += drop.size_bytes
        now_s = time.monotonic()
        delay_s = _DROP_DELAY_S if self._drops_bytes < _URGENT_DROP_BYTES else 0.0
        self._drops_due_s = min(self._drops_due_s, now_s + delay_s)

    def _send_drops(self) -> None:
        """Drop what is to be dropped; what cannot be now stays for later."""
        while self._drops and (opened := self.session) is not None:
            batch = self._drops[:_DROPS_PER_CALL]
            request = pb.DropTensorsRequest(session=opened.name, residents=batch)
            deadline = Deadline(_DROP_TIMEOUT_S)
            tell = partial(Stub.drop_tensors, request=request, deadline=deadline)
            try:
                self._route.call_once(tell, deadline)
            except LostSessionError:
                self.lose(opened.name)
            except DeconvdError as error:
                _log.debug("%d tensors could not be dropped yet: %s", len(batch), error)
                self._drops_due_s = time.monotonic() + _DROP_RETRY_S
                return
            del self._drops[: len(batch)]
        self._clear_drops()

    def _clear_drops(self) -> None:
        self._drops.clear()
        self._drops_due_s, self._drops_bytes = math.inf, 0

    def _end_session(self) -> None:
        with self._lock:
            hold = self._stream
            self._move(SessionThreadState.ENDED)
        if hold is None:
            return
        ended = threading.Event()
        hold.add_done_callback(ended.set)
        hold.close()
        if not ended.wait(_END_TIMEOUT_S):
            hold.cancel()
