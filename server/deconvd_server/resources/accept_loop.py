"""A loop that accepts connections: for direct connections, and for clients of shared memory."""

from __future__ import annotations

import errno
import heapq
import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeAlias

from deconvd_server.resources.unix_listener import SideSocket

__all__ = ["SHORTAGE_PAUSE_S", "Listener"]

_RESTORE_PERIOD_S: Final = 5.0
"""How often it checks whether its sockets' files still exist."""

_PAUSE_S: Final = 0.1
"""How long it accepts nothing after a connection could not be accepted."""

SHORTAGE_PAUSE_S: Final = 0.01
"""How long a loop rests before it does again what there was no memory for."""

_SHORTAGES: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC}
)
"""What system calls say where descriptors, memory, or the descriptors that a user may watch have run out."""

_Action: TypeAlias = Callable[[], None]

_log = logging.getLogger(__name__)


class Listener:
    """Accepts connections, and runs actions for other descriptors, in the thread that calls `run`.

    While the system has no descriptors, threads or memory left, it tries again after a pause; the log says so
    once. An action that met such a shortage is run again, after the others: it must allow that. If someone
    removes the file of a Unix socket, it makes the file again. It looks at the clock in every round, so that
    busy clients cannot delay what is due.

    Args:
        peers: Who connects, in the plural, for the log.
        side_sockets: Unix sockets to listen on. It removes and closes them.
        sockets: Other listening sockets, which must not block. It closes them.
        on_connection: Called in the thread with each connection and its peer's address. It owns the
            connection, unless it raises OSError, RuntimeError or MemoryError, because there are no
            descriptors, threads or memory left.
        on_lost: Called in the thread with the thread's name if an unforeseen error ends `run`. No connection is
            accepted after that.
    """

    def __init__(
        self,
        peers: str,
        side_sockets: Sequence[SideSocket],
        sockets: Sequence[socket.socket],
        on_connection: Callable[[socket.socket, Any], None],
        on_lost: Callable[[str], None],
    ) -> None:
        self._peers = peers
        self._side_sockets = tuple(side_sockets)
        self._sockets = {
            s.fileno(): s for s in (*sockets, *(side_socket.socket for side_socket in side_sockets))
        }
        self._on_connection = on_connection
        self._on_lost = on_lost
        self._is_stopped = False
        self._is_short = False  # of descriptors, threads or memory
        self._resume_due_s: float | None = None
        self._restore_due_s = time.monotonic() + _RESTORE_PERIOD_S
        self._actions: dict[int, _Action] = {}  # by descriptor
        self._pending: deque[_Action] = deque()
        self._timers: list[tuple[float, int, _Action]] = []  # a heap, by the time when they are due
        self._timers_count = 0  # of all time, which orders those that are due at the same time
        self._events = select.epoll()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for wake in (self._wake_receiver, self._wake_sender):
            wake.setblocking(False)
        self.watch(self._wake_receiver.fileno(), self._wake)
        self._listen()

    def run(self) -> None:
        """Accept connections and run actions until `stop`, or until an unforeseen error."""
        try:
            while not self._is_stopped:
                self._attempt(self._run_once)
        except Exception:  # noqa: BLE001 - logged, and the server ends
            _log.exception("%s are no longer served: unforeseen error", self._peers)
            self._on_lost(f"the thread for {self._peers}")
        finally:
            self._stop_listening()

    def watch(self, descriptor: int, action: _Action, events: int = select.EPOLLIN) -> None:
        """Call `action` whenever there are events on a descriptor, and no other action.

        Only the thread that calls `run` may call this.
        """
        before = self._actions.get(descriptor)
        self._actions[descriptor] = action
        if before is not None:
            self._events.modify(descriptor, events)
            return
        try:
            self._events.register(descriptor, events)
        except BaseException:
            del self._actions[descriptor]
            raise

    def unwatch(self, descriptor: int) -> None:
        """Stop watching a descriptor, if it is watched. Any thread may call this, before it closes the descriptor."""
        if self._actions.pop(descriptor, None) is not None:
            with suppress(OSError):  # another thread has closed it already
                self._events.unregister(descriptor)

    def call_soon(self, action: _Action) -> None:
        """Call `action` in the thread that calls `run`. Any thread may call this."""
        self._pending.append(action)
        with suppress(OSError):  # full: then the thread wakes anyway; or closed
            self._wake_sender.send(b"\0")

    def call_later(self, delay_s: float, action: _Action) -> None:
        """Call `action` in `delay_s` seconds. Only the thread that calls `run` may call this, or one before it runs."""
        self._timers_count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timers_count, action))

    def pause(self, error: Exception) -> None:
        """Accept nothing for a moment. The log says why, but only once: the shortage may last.

        Only the thread that calls `run` may call this.
        """
        self._resume_due_s = time.monotonic() + _PAUSE_S
        for descriptor in self._sockets:
            with suppress(FileNotFoundError):  # paused already
                self._events.unregister(descriptor)
        if not self._is_short:
            reason = str(error) or "memory has run out"
            _log.warning("%s are not accepted for now: %s", self._peers, reason)
        self._is_short = True

    def withdraw(self) -> None:
        """Accept no more connections, and remove the sockets' files, so that a successor can have their paths."""
        for side_socket in self._side_sockets:
            side_socket.remove()
        self.call_soon(self._stop_listening)

    def stop(self) -> None:
        """Let `run` return soon."""
        self.call_soon(self._stop)

    def close(self) -> None:
        """Run the actions of `call_soon` that are left. To be called once, after `run` has returned."""
        while self._pending:
            self._run_pending()
        self._events.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _run_once(self) -> None:
        until_s = min(self._restore_due_s, self._resume_due_s or self._restore_due_s)
        if self._timers:
            until_s = min(until_s, self._timers[0][0])
        ready = [fd for fd, _ in self._events.poll(max(until_s - time.monotonic(), 0))]
        # first the events of open connections: one may end and be closed, and a new connection, accepted
        # after it, may get the same descriptor
        for descriptor in ready:
            if (action := self._actions.get(descriptor)) is not None:
                self._attempt(action)
        if self._pending:  # since there was too little memory for one
            self._run_pending()
        for descriptor in ready:
            if (listener_socket := self._sockets.get(descriptor)) is not None:
                self._accept(listener_socket)
        now_s = time.monotonic()
        while self._timers and self._timers[0][0] <= now_s:
            timer = heapq.heappop(self._timers)
            if not self._attempt(timer[2]):
                heapq.heappush(self._timers, timer)  # else what calls itself again ends for good
                break
        if now_s >= self._restore_due_s:
            self._restore_sockets(now_s)
        if self._resume_due_s is not None and now_s >= self._resume_due_s:
            self._listen()

    def _restore_sockets(self, now_s: float) -> None:
        self._restore_due_s = now_s + _RESTORE_PERIOD_S
        for side_socket in self._side_sockets:
            if side_socket.restore():
                self._listen()

    def _accept(self, listener_socket: socket.socket) -> None:
        try:
            connection, address = listener_socket.accept()
        except BlockingIOError:  # the client has disconnected already
            return
        except (OSError, MemoryError) as error:
            self.pause(error)
            return
        try:
            self._on_connection(connection, address)
        except (OSError, RuntimeError, MemoryError) as error:
            self.unwatch(connection.fileno())
            connection.close()
            self.pause(error)
        except BaseException:
            connection.close()
            raise
        else:
            self._is_short = False

    def _listen(self) -> None:
        self._resume_due_s = None
        for descriptor in self._sockets:
            with suppress(FileExistsError):  # still registered: it was neither paused nor replaced
                self._events.register(descriptor, select.EPOLLIN)

    def _stop_listening(self) -> None:
        for listener_socket in self._sockets.values():
            listener_socket.close()
        self._sockets.clear()
        self._resume_due_s = None

    def _wake(self) -> None:
        with suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        self._run_pending()

    def _run_pending(self) -> None:
        while self._pending:
            action = self._pending.popleft()
            if not self._attempt(action):
                # last: while the shortage lasts, `_stop`, say, must get its turn
                self._pending.append(action)
                return

    def _attempt(self, action: _Action) -> bool:
        """Run an action. Return False, after a pause, if it met a shortage: then the caller must run it again."""
        try:
            action()
        except (MemoryError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in _SHORTAGES:
                raise
            time.sleep(SHORTAGE_PAUSE_S)
            with suppress(MemoryError):  # there is too little to say so
                self.pause(error)
            return False
        return True

    def _stop(self) -> None:
        self._is_stopped = True
