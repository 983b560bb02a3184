"""Takes lines for direct calls, from this host and over TCP, and sees who goes. See `deconvd.direct_protocol`."""

from __future__ import annotations

import logging
import select
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any, Final

from deconvd.byte_stream import SocketStream
from deconvd.direct_events import Method
from deconvd_server.attention import Attention
from deconvd_server.behaviours import Behaviour
from deconvd_server.direct_line import DirectLine
from deconvd_server.serve import Observer
from deconvd_server.side_socket import MEND_S, SideSocket, peer_of

__all__ = ["DirectServer"]

_LINES_COUNT: Final = 256
"""Each takes a thread, which costs little while it waits."""

_ROOM_S: Final = 1.0
"""How long an idle line may take to end, so that another can be taken."""

_PAUSE_S: Final = 0.1
"""How long no line is taken after one could not be."""

_log = logging.getLogger(__name__)


class DirectServer:
    """Serves direct calls: each line in a thread of its own, while one takes new lines and sees who goes.

    When there are too many lines, one that is idle makes room; if none is, a new one is not taken.

    Args:
        sides: Listen for processes of this host. All that may open them are served.
        listeners: Sockets that listen for TCP connections. It closes them, and those of `sides`.
        behaviours: What serves each method, by its name.
        instance: The server's id.
        observers: Hear of every call.
    """

    def __init__(
        self,
        sides: Sequence[SideSocket],
        listeners: Sequence[socket.socket],
        behaviours: Mapping[str, Behaviour],
        instance: bytes,
        observers: Sequence[Observer],
    ) -> None:
        self._behaviours = {method: behaviours[method.name] for method in Method}
        self._instance = instance
        self._observers = observers
        self._attention = Attention()
        self._lock = threading.Lock()
        self._lines: dict[int, DirectLine] = {}  # by descriptor
        self._is_withdrawn = False
        self._is_short = False  # of descriptors or threads
        self._sides = tuple(sides)
        all_listeners = [*listeners, *(side.socket for side in sides)]
        self._listeners = {listener.fileno(): listener for listener in all_listeners}
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._events = select.epoll()
        for descriptor in (*self._listeners, self._wake_receiver.fileno()):
            self._events.register(descriptor, select.EPOLLIN)
        self._thread = threading.Thread(target=self._watch, name="direct-calls", daemon=True)
        self._thread.start()

    def withdraw(self) -> None:
        """Take no more calls, and give up the paths. Calls under way go on."""
        for side in self._sides:
            side.remove()
        with self._lock:
            self._is_withdrawn = True
        for line in self._all_lines():
            line.take_no_more()

    def cancel(self) -> None:
        """Cancel the calls under way."""
        for line in self._all_lines():
            line.cancel()

    def close(self, timeout_s: float) -> None:
        """Withdraw, and return once no call is under way: after `timeout_s` they are cancelled."""
        self.withdraw()
        deadline_s = time.monotonic() + timeout_s
        for line in self._all_lines():
            line.thread.join(max(deadline_s - time.monotonic(), 0))
            line.cancel()
            line.thread.join()
        self._wake_sender.close()
        self._thread.join()

    def _all_lines(self) -> list[DirectLine]:
        with self._lock:
            return list(self._lines.values())

    def _watch(self) -> None:
        waking = self._wake_receiver.fileno()
        with ExitStack() as stack:
            stack.enter_context(self._events)
            for held in (self._wake_receiver, *self._listeners.values()):
                stack.enter_context(held)
            while True:
                ready = {descriptor for descriptor, _ in self._events.poll(MEND_S)}
                if not ready:
                    self._mend()
                # those who go before those who come, who may get the same descriptor
                for descriptor in ready - self._listeners.keys() - {waking}:
                    self._see_off(descriptor)
                if waking in ready:
                    return
                for descriptor in ready & self._listeners.keys():
                    self._accept(self._listeners[descriptor])

    def _mend(self) -> None:
        for side in self._sides:
            if side.mend():
                self._events.register(side.socket.fileno(), select.EPOLLIN)

    def _see_off(self, descriptor: int) -> None:
        """Cancel the call of a client that has gone, or of a line that has ended by itself."""
        with self._lock:
            line = self._lines.get(descriptor)
        with suppress(OSError):  # it has been closed already
            self._events.unregister(descriptor)
        if line is not None:
            line.cancel()

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, address = listener.accept()
        except BlockingIOError:  # the client has gone again
            return
        except OSError as error:  # there are no descriptors left
            self._pause(error)
            return
        try:
            self._take(connection, address)
        except (OSError, RuntimeError) as error:  # or no threads
            connection.close()
            self._pause(error)
        else:
            self._is_short = False

    def _pause(self, error: Exception) -> None:
        """Wait a moment before the next line is taken, and say why once: what is short may be for long."""
        if not self._is_short:
            _log.warning("direct lines are not taken for now: %s", error)
        self._is_short = True
        select.select([self._wake_receiver], [], [], _PAUSE_S)

    def _take(self, connection: socket.socket, address: Any) -> None:
        peer = _description(connection, address)
        self._make_room()
        with self._lock:
            has_room = len(self._lines) < _LINES_COUNT and not self._is_withdrawn
            if not has_room:
                _log.info("%s is not served directly", peer)
                connection.close()
                return
            line = DirectLine(
                SocketStream(connection),
                peer,
                self._behaviours,
                self._instance,
                self._attention,
                self._observers,
                self._forget,
            )
            self._events.register(line.descriptor, select.EPOLLRDHUP)
            line.thread.start()
            self._lines[line.descriptor] = line

    def _make_room(self) -> None:
        """End the line that has been idle for longest, if there are too many."""
        with self._lock:
            if len(self._lines) < _LINES_COUNT:
                return
            idle = [line for line in self._lines.values() if line.is_idle]
        if idle:
            oldest = min(idle, key=lambda line: line.idle_since_s)
            oldest.take_no_more()
            oldest.thread.join(_ROOM_S)

    def _forget(self, line: DirectLine) -> None:
        with self._lock:
            self._lines.pop(line.descriptor)


def _description(connection: socket.socket, address: Any) -> str:
    """Return who has connected, for the log."""
    if connection.family == socket.AF_UNIX:
        return f"unix: {peer_of(connection)}"
    host, port = address[:2]
    return f"tcp: {host}:{port}"
