"""A loop that accepts connections: for direct calls, and for shared memory."""

from __future__ import annotations

import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias

from deconvd_server.resources.unix_listener import SideSocket

__all__ = ["Listener"]

_RESTORE_PERIOD_S: Final = 5.0
"""How often it looks after its sockets' files."""

_PAUSE_S: Final = 0.1
"""How long no connection is taken after one could not be."""

_Action: TypeAlias = Callable[[], None]

_log = logging.getLogger(__name__)


class Listener:
    """Accepts connections, and acts on events of other descriptors, in the thread that runs it.

    While the system has no descriptors or threads left, it tries again every now and then; the log says so
    once. It makes the file of a Unix socket anew if someone removes it. Every round looks at the clock, so that no
    traffic puts off what is due.

    Args:
        who: Those who connect, in the plural, for the log.
        sides: Unix sockets to listen on. It removes and closes them.
        sockets: Others that listen, and do not block. It closes them.
        on_connection: Called in the thread with each connection and its peer's address: it owns the
            connection, unless it raises OSError, RuntimeError or MemoryError: for want of descriptors, threads or
            memory.
        on_lost: Called in the thread, with what is lost, if an error that was not foreseen ends `run`: nobody is
            taken any more.
    """

    def __init__(
        self,
        who: str,
        sides: Sequence[SideSocket],
        sockets: Sequence[socket.socket],
        on_connection: Callable[[socket.socket, Any], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._who = who
        self._sides = tuple(sides)
        self._sockets = {s.fileno(): s for s in (*sockets, *(side.socket for side in sides))}
        self._on_connection = on_connection
        self._on_lost = on_lost
        self._is_stopped = False
        self._is_short = False  # of descriptors or threads
        self._resume_due_s: float | None = None
        self._restore_due_s = time.monotonic() + _RESTORE_PERIOD_S
        self._actions: dict[int, _Action] = {}  # by descriptor
        self._pending: deque[_Action] = deque()
        self._events = select.epoll()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for wake in (self._wake_receiver, self._wake_sender):
            wake.setblocking(False)
        self.watch(self._wake_receiver.fileno(), self._wake)
        self._listen()

    def run(self) -> None:
        """Accept and act until it is stopped, or lost."""
        try:
            while not self._is_stopped:
                self._run_once()
        except Exception:  # noqa: BLE001 - logged, and the server ends
            _log.exception("%s are served no more: unforeseen error", self._who)
            self._on_lost(f"the thread for {self._who}")
        finally:
            self._stop_listening()

    def watch(self, descriptor: int, action: _Action, events: int = select.EPOLLIN) -> None:
        """Act in the thread that runs it, which must call this, whenever there are events on a descriptor."""
        self._events.register(descriptor, events)
        self._actions[descriptor] = action

    def unwatch(self, descriptor: int) -> None:
        """Watch a descriptor no more, if it is watched. Any thread may call this, before it closes the descriptor."""
        if self._actions.pop(descriptor, None) is not None:
            with suppress(OSError):  # its owner closed it while another thread was at it here
                self._events.unregister(descriptor)

    def call_soon(self, action: _Action) -> None:
        """Have the thread do something. Any thread may call this."""
        self._pending.append(action)
        with suppress(OSError):  # it is full, so the thread wakes anyway; or it is closed
            self._wake_sender.send(b"\0")

    def withdraw(self) -> None:
        """Take no more connections, and give up the paths, so that a successor can have them."""
        for side in self._sides:
            side.remove()
        self.call_soon(self._stop_listening)

    def stop(self) -> None:
        """Let `run` return soon."""
        self.call_soon(self._stop)

    def close(self) -> None:
        """Do what `call_soon` was told and `run` has not done. To be called once that has returned."""
        self._run_pending()
        self._events.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _run_once(self) -> None:
        until_s = min(self._restore_due_s, self._resume_due_s or self._restore_due_s)
        ready = [fd for fd, _ in self._events.poll(max(until_s - time.monotonic(), 0))]
        # those who go before those who come, who may get the same descriptor
        for descriptor in ready:
            if (action := self._actions.get(descriptor)) is not None:
                action()
        for descriptor in ready:
            if (listening := self._sockets.get(descriptor)) is not None:
                self._accept(listening)
        now_s = time.monotonic()
        if now_s >= self._restore_due_s:
            self._restore_sockets(now_s)
        if self._resume_due_s is not None and now_s >= self._resume_due_s:
            self._listen()

    def _restore_sockets(self, now_s: float) -> None:
        self._restore_due_s = now_s + _RESTORE_PERIOD_S
        for side in self._sides:
            if side.restore():
                self._listen()

    def _accept(self, listening: socket.socket) -> None:
        try:
            connection, address = listening.accept()
        except BlockingIOError:  # the client has gone again
            return
        except OSError as error:
            self._pause(error)
            return
        try:
            self._on_connection(connection, address)
        except (OSError, RuntimeError, MemoryError) as error:
            self.unwatch(connection.fileno())
            connection.close()
            self._pause(error)
        except BaseException:
            connection.close()
            raise
        else:
            self._is_short = False

    def _pause(self, error: Exception) -> None:
        """Accept nothing for a moment, and say why once: what is short may be for long."""
        if not self._is_short:
            _log.warning("%s are not accepted for now: %s", self._who, error)
        self._is_short = True
        self._resume_due_s = time.monotonic() + _PAUSE_S
        for descriptor in self._sockets:
            with suppress(FileNotFoundError):  # it has just been paused for another
                self._events.unregister(descriptor)

    def _listen(self) -> None:
        self._resume_due_s = None
        for descriptor in self._sockets:
            with suppress(FileExistsError):  # it was neither paused nor made anew
                self._events.register(descriptor, select.EPOLLIN)

    def _stop_listening(self) -> None:
        for listening in self._sockets.values():
            listening.close()
        self._sockets.clear()
        self._resume_due_s = None

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        self._run_pending()

    def _run_pending(self) -> None:
        while self._pending:
            self._pending.popleft()()

    def _stop(self) -> None:
        self._is_stopped = True
