"""The thread that holds a session: it gives signs of life, resumes what broke, and drops what nobody uses."""

from __future__ import annotations

import logging
import math
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from typing import Final

from deconvd.errors import DeconvdError, LostSessionError, NotFoundError
from deconvd.system import LONGEST_S
from deconvd.v1 import deconvd_pb2 as pb
from deconvd_client.deadline import Deadline
from deconvd_client.hold import Hold
from deconvd_client.nearest import Nearest
from deconvd_client.stub import Stub
from deconvd_client.uninterrupted import Promise, do_beside

__all__ = ["Asking", "Drop", "Flush", "Keeper", "Mailbox", "Opened"]

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


class Keeper:
    """Holds one session at a time.

        NONE --asked--> OPEN --its stream breaks--> BROKEN --resumed--> OPEN
        OPEN or BROKEN --the server does not know it, or its lease has passed--> NONE

    It knows nothing of those who use it, so that it ends with the last of them.

    Attributes:
        mailbox: What it is to do.
        opened: The session, while it is open or broken.

    Args:
        nearest: The ways to the server.
        tenant_key: As in HoldSessionRequest.
    """

    def __init__(self, nearest: Nearest, tenant_key: bytes) -> None:
        self.mailbox: Mailbox = SimpleQueue()
        self.opened: Opened | None = None
        self._nearest = nearest
        self._tenant_key = tenant_key
        self._is_held = threading.Lock()
        self._ended: SimpleQueue[None] = SimpleQueue()
        self._hold: Hold | None = None  # None while there is no session, or it is broken
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
        opened = self.opened
        if opened is not None and opened.name == name:
            self.opened = None

    # What follows runs in the thread.

    def _hold_session(self) -> None:
        if self._is_held.acquire(blocking=False):  # else another thread was asked at the same time
            try:
                self._run()
            finally:
                self._is_held.release()
                self._ended.put(None)

    def _run(self) -> None:
        while True:
            wish = self._next()
            if isinstance(wish, _End):
                break
            if wish is not None:
                self._fulfil(wish)
            if self.opened is None:
                self._let_go()
            elif time.monotonic() >= self._due_s:
                self._renew(self.opened)
            if time.monotonic() >= self._drops_due_s:
                self._drop()
        self._finish()

    def _next(self) -> Wish | None:
        """Wait for a wish, or for the time to do something without one."""
        if self.opened is None:
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
                if hold is self._hold:
                    hold.cancel()
                    self._hold = None
                    self._pause_s = 0.0
                    self._due_s = time.monotonic()
                    self._lost_s = self._due_s + self._lease_s

    def _answer(self, asking: Asking) -> None:
        try:
            if self.opened is None:
                self._let_go()
                self._open(b"", asking.deadline, fail_fast=asking.fail_fast)
            assert self.opened is not None
            asking.answer.fulfil(self.opened)
        except Exception as error:  # whatever it is, it is the asker's
            asking.answer.fail(error)

    def _open(self, name: bytes, deadline: Deadline, *, fail_fast: bool) -> None:
        """Open a session, or resume that of a name."""
        opening = pb.HoldSessionRequest(session=name, tenant_key=self._tenant_key)

        def open_hold(stub: Stub) -> Hold:
            return stub.hold_session(opening, deadline)

        call = self._nearest.call_once if fail_fast else self._nearest.call
        hold = call(open_hold, deadline)
        self._hold = hold
        self._lease_s = min(LONGEST_S, hold.opened.lease_s)  # also where it is not a number
        self._due_s = time.monotonic() + self._lease_s / _SIGNS_PER_LEASE
        self.opened = Opened(hold.opened.session, hold.opened.quota_bytes)
        mailbox = self.mailbox
        hold.on_end(lambda: mailbox.put(_Broken(hold)))

    def _renew(self, opened: Opened) -> None:
        """Give a sign of life, or try to resume what is broken."""
        if self._hold is not None:
            self._hold.give_sign()
            self._due_s = time.monotonic() + self._lease_s / _SIGNS_PER_LEASE
            return
        try:
            self._open(opened.name, Deadline(_RESUME_TIMEOUT_S), fail_fast=True)
        except NotFoundError as error:
            self._give_up(error)
        except DeconvdError as error:
            if time.monotonic() >= self._lost_s:
                self._give_up(error)
            self._pause_s = min(max(2 * self._pause_s, _RESUME_PAUSE_S), _RESUME_LONGEST_PAUSE_S)
            self._due_s = time.monotonic() + self._pause_s

    def _give_up(self, error: DeconvdError) -> None:
        _log.info("the session has ended, and tensors are sent again as they are used: %s", error)
        self.opened = None
        self._let_go()

    def _let_go(self) -> None:
        """Leave a session that is no more."""
        self._drops.clear()
        self._drops_due_s, self._drops_bytes = math.inf, 0
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None

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
        opened = self.opened
        while self._drops and opened is not None:
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
        self._drops_due_s, self._drops_bytes = math.inf, 0

    def _finish(self) -> None:
        hold, self._hold = self._hold, None
        self.opened = None
        if hold is None:
            return
        ended = threading.Event()
        hold.on_end(ended.set)
        hold.close()
        if not ended.wait(_END_TIMEOUT_S):
            hold.cancel()
