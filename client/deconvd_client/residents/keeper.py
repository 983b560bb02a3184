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
from deconvd.forks import new_lock
from deconvd.system import LONGEST_S
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.deadline import Deadline
from deconvd_client.hold import Hold
from deconvd_client.nearest import Nearest
from deconvd_client.stub import Stub
from deconvd_client.uninterrupted import Promise, do_beside

__all__ = ["Asking", "Drop", "Flush", "Keeper", "Mailbox", "Opened", "SessionState"]

_SIGNS_PER_LEASE: Final = 3
_RESUME_PAUSE_S: Final = 0.1
_RESUME_LONGEST_PAUSE_S: Final = 1.0
_RESUME_TIMEOUT_S: Final = 5.0
_DROPS_PER_CALL: Final = 4096
_DROP_DELAY_S: Final = 0.05
"""For how long drops are gathered, so that they do not disturb the calls among which tensors come and go."""

_DROP_BYTES: Final = 32 << 20
"""What is not kept waiting, since it may soon be needed."""

_DROP_TIMEOUT_S: Final = 5.0
_DROP_RETRY_S: Final = 1.0
_END_TIMEOUT_S: Final = 0.5
"""How long a server has to take note of the end of a session."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that the server has opened.

    Attributes:
        name: The secret by which it is known.
        quota_bytes: What may be kept in it.
    """

    name: bytes
    quota_bytes: int


@dataclass(frozen=True, slots=True)
class Drop:
    """Wish: drop a tensor, unless its session has ended."""

    session: bytes
    resident: pb.Resident
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Asking:
    """Wish: say which session is open, after opening one if need be.

    Attributes:
        deadline: Until when to try.
        fail_fast: Whether to try once.
    """

    answer: Promise[Opened]
    deadline: Deadline
    fail_fast: bool


@dataclass(frozen=True, slots=True)
class Flush:
    """Wish: say when all earlier wishes have been seen to."""

    answer: Promise[None]


@dataclass(frozen=True, slots=True)
class _Broken:
    """News: a stream has ended."""

    hold: Hold


class _End:
    """Wish: end the session, and the thread."""


Wish = Drop | Asking | Flush | _Broken | _End

Mailbox = SimpleQueue[Wish]
"""What the thread is to do. A finalizer may put something into it, wherever it happens to run."""


class SessionState(Enum):
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


class Keeper:
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

    def __init__(self, nearest: Nearest, tenant_key: bytes) -> None:
        self.mailbox: Mailbox = SimpleQueue()
        self._nearest = nearest
        self._tenant_key = tenant_key
        self._is_held = threading.Lock()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._lock = new_lock()  # of what `_move` changes
        self.state: SessionState = SessionState.NONE
        self.opened: Opened | None = None
        self._hold: Hold | None = None  # while it is OPEN, and in LOST until it is left
        self._lease_s = 0.0
        self._due_s = 0.0  # of the next sign of life, or the next try to resume
        self._lost_s = 0.0  # when a broken session is given up
        self._pause_s = 0.0
        self._drops: list[pb.Resident] = []
        self._drops_due_s = math.inf
        self._drops_bytes = 0

    def start(self) -> None:
        """Have a thread hold the session, if none does. It does not keep the process alive."""
        if not self._is_held.locked():
            do_beside(self._hold_session)

    def await_end(self, deadline: Deadline) -> None:
        """Return once the thread has ended, or at the deadline."""
        with suppress(Empty):
            if self._is_held.locked():
                self._ended.get(timeout=deadline.remaining_s())

    def end(self) -> None:
        """Ask for the end of the session and of the thread."""
        self.mailbox.put(_End())

    def lose(self, name: bytes) -> None:
        """Take note that the server does not know a session. May be called in any thread."""
        with self._lock:
            if self.opened is not None and self.opened.name == name:
                self._move(SessionState.LOST, hold=self._hold)

    def _move(
        self, to: SessionState, *, opened: Opened | None = None, hold: Hold | None = None
    ) -> None:
        """Change the state, and what belongs to it. Called with the lock held."""
        self.state, self.opened, self._hold = to, opened, hold

    # What follows runs in the thread.

    def _hold_session(self) -> None:
        if self._is_held.acquire(blocking=False):  # else another thread was asked at the same time
            try:
                self._run()
            finally:
                self._is_held.release()
                self._ended.put(None)

    def _run(self) -> None:
        while self.state is not SessionState.ENDED:
            wish = self._next()
            if wish is not None:
                self._fulfil(wish)
            if time.monotonic() >= self._due_s:
                self._renew()
            if time.monotonic() >= self._drops_due_s:
                self._drop()
            if self.state is SessionState.LOST:
                self._let_go()

    def _next(self) -> Wish | None:
        """Wait for a wish, or for the time to do something without one."""
        if self.state is SessionState.NONE:
            return self.mailbox.get()
        due_s = min(self._due_s, self._drops_due_s)
        try:
            return self.mailbox.get(timeout=max(due_s - time.monotonic(), 0))
        except Empty:
            return None

    def _fulfil(self, wish: Wish) -> None:
        match wish:
            case Drop():
                self._gather(wish)
            case Asking():
                self._answer(wish)
            case Flush(answer):
                self._drop()
                answer.fulfil(None)
            case _Broken(hold):
                self._note_end(hold)
            case _End():
                self._finish()

    def _answer(self, asking: Asking) -> None:
        try:
            opened = self.opened
            if opened is None:
                if self.state is SessionState.LOST:
                    self._let_go()
                opened = self._open(b"", asking.deadline, fail_fast=asking.fail_fast)
            asking.answer.fulfil(opened)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the asker's
            asking.answer.fail(error)

    def _open(self, name: bytes, deadline: Deadline, *, fail_fast: bool) -> Opened:
        """Open a session, or resume that of a name."""
        opening = pb.HoldSessionRequest(session=name, tenant_key=self._tenant_key)

        def open_hold(stub: Stub) -> Hold:
            return stub.hold_session(opening, deadline)

        call = self._nearest.call_once if fail_fast else self._nearest.call
        hold = call(open_hold, deadline)
        opened = Opened(hold.opened.session, hold.opened.quota_bytes)
        self._lease_s = min(LONGEST_S, hold.opened.lease_s)  # also where it is not a number
        self._due_s = time.monotonic() + self._lease_s / _SIGNS_PER_LEASE
        with self._lock:
            self._move(SessionState.OPEN, opened=opened, hold=hold)
        mailbox = self.mailbox
        hold.on_end(lambda: mailbox.put(_Broken(hold)))
        return opened

    def _note_end(self, hold: Hold) -> None:
        """Take note that a stream has ended: if it is the session's, that is to be resumed now."""
        with self._lock:
            if self.state is not SessionState.OPEN or hold is not self._hold:
                return
            self._move(SessionState.BROKEN, opened=self.opened)
        hold.cancel()
        self._pause_s = 0.0
        self._due_s = time.monotonic()
        self._lost_s = self._due_s + self._lease_s

    def _renew(self) -> None:
        """Give a sign of life, or try to resume what is broken."""
        with self._lock:
            opened, hold = self.opened, self._hold
        if hold is not None:
            hold.give_sign()
            self._due_s = time.monotonic() + self._lease_s / _SIGNS_PER_LEASE
        elif opened is not None:
            self._resume(opened)

    def _resume(self, opened: Opened) -> None:
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

    def _give_up(self, opened: Opened, error: DeconvdError) -> None:
        _log.info("the session has ended, and tensors are sent again as they are used: %s", error)
        self.lose(opened.name)

    def _let_go(self) -> None:
        """Leave a session that is no more."""
        self._clear_drops()
        with self._lock:
            hold = self._hold
            self._move(SessionState.NONE)
        if hold is not None:
            hold.cancel()

    def _gather(self, drop: Drop) -> None:
        if self.opened is None or self.opened.name != drop.session:
            return
        self._drops.append(drop.resident)
        self._drops_bytes += drop.size_bytes
        now_s = time.monotonic()
        delay_s = _DROP_DELAY_S if self._drops_bytes < _DROP_BYTES else 0.0
        self._drops_due_s = min(self._drops_due_s, now_s + delay_s)

    def _drop(self) -> None:
        """Drop what is to be dropped; what cannot be now stays for later."""
        while self._drops and (opened := self.opened) is not None:
            batch = self._drops[:_DROPS_PER_CALL]
            request = pb.DropTensorsRequest(session=opened.name, residents=batch)
            deadline = Deadline(_DROP_TIMEOUT_S)
            tell = partial(Stub.drop_tensors, request=request, deadline=deadline)
            try:
                self._nearest.call_once(tell, deadline)
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

    def _finish(self) -> None:
        with self._lock:
            hold = self._hold
            self._move(SessionState.ENDED)
        if hold is None:
            return
        ended = threading.Event()
        hold.on_end(ended.set)
        hold.close()
        if not ended.wait(_END_TIMEOUT_S):
            hold.cancel()
