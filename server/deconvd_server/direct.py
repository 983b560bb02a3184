"""Serves direct calls: those of processes on this host, without gRPC. See `deconvd.direct`."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from google.protobuf.message import Message

from deconvd.codec import Envelope, encode
from deconvd.direct import MAX_PACKET_BYTES, Method, Outcome, Reply, Request
from deconvd.errors import ExhaustedError
from deconvd.status import told_as_status
from deconvd_server.call import Call
from deconvd_server.rpc import decoded, told
from deconvd_server.shared_memory.place import SideSocket, peer_of

__all__ = ["Behaviour", "DirectServer"]

_LINES_COUNT: Final = 256
"""Each takes a thread, which costs little while it waits."""

_FRAMING_BYTES: Final = 1024
"""More than a reply has beside the response."""

_log = logging.getLogger(__name__)


class Behaviour(NamedTuple):
    """What serves a method."""

    request_type: type[Message]
    serve: Callable[[Envelope[Any], Call], Envelope[Any]]


class DirectServer:
    """Serves direct calls: each line in a thread of its own, while one takes new lines and sees who goes.

    Nothing is handed from thread to thread on a call's way, which is why it is fast.

    Args:
        path: Where to listen, beside the socket for gRPC.
        behaviours: What serves the methods.
        users: Ids of the users whose calls are taken.

    Raises:
        OSError: It cannot listen there.
    """

    def __init__(
        self, path: Path, behaviours: Mapping[Method, Behaviour], users: Collection[int]
    ) -> None:
        self._behaviours = behaviours
        self._users = frozenset(users)
        self._lock = threading.Lock()
        self._lines: dict[int, _Line] = {}  # by descriptor
        self._is_withdrawn = False
        self._side = SideSocket(path, for_others=not self._users <= {0, os.geteuid()})
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._events = select.epoll()
        self._events.register(self._side.socket, select.EPOLLIN)
        self._events.register(self._wake_receiver, select.EPOLLIN)
        self._thread = threading.Thread(target=self._watch, name="direct-calls", daemon=True)
        self._thread.start()

    def withdraw(self) -> None:
        """Take no more calls, and give up the path. Calls under way go on."""
        self._side.remove()
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

    def _all_lines(self) -> list[_Line]:
        with self._lock:
            return list(self._lines.values())

    def _watch(self) -> None:
        with self._events, self._side.socket, self._wake_receiver:
            while True:
                ready = {descriptor for descriptor, _ in self._events.poll()}
                listening, waking = self._side.socket.fileno(), self._wake_receiver.fileno()
                # those who go before those who come, who may get the same descriptor
                for descriptor in ready - {listening, waking}:
                    self._see_off(descriptor)
                if waking in ready:
                    return
                if listening in ready:
                    self._accept()

    def _see_off(self, descriptor: int) -> None:
        """Cancel the call of a client that has gone, or of a line that has ended by itself."""
        with self._lock:
            line = self._lines.get(descriptor)
        with suppress(OSError):  # it has been closed already
            self._events.unregister(descriptor)
        if line is not None:
            line.cancel()

    def _accept(self) -> None:
        try:
            connection, _ = self._side.socket.accept()
        except OSError as error:  # the client has gone, or there are no descriptors left
            _log.warning("a direct line was not taken: %s", error)
            return
        peer = peer_of(connection)
        connection.setblocking(True)
        with self._lock:
            has_room = len(self._lines) < _LINES_COUNT and not self._is_withdrawn
            if not has_room or peer.user not in self._users:
                _log.info("%s is not served directly", peer)
                connection.close()
                return
            line = _Line(connection, f"unix: {peer}", self._behaviours, self._forget)
            self._lines[line.descriptor] = line
            self._events.register(connection, 0)  # for its end, which is always told
            line.thread.start()

    def _forget(self, line: _Line) -> None:
        with self._lock:
            self._lines.pop(line.descriptor)


class _Line:
    """One client's socket, by which it makes one call after the other.

    Attributes:
        thread: Serves it.

    Args:
        peer: Who it is, for the log.
        on_end: Called when it ends, before its descriptor can be another's.
    """

    def __init__(
        self,
        connection: socket.socket,
        peer: str,
        behaviours: Mapping[Method, Behaviour],
        on_end: Callable[[_Line], None],
    ) -> None:
        self.descriptor = connection.fileno()
        self.thread = threading.Thread(target=self._serve, name=f"direct {peer}", daemon=True)
        self._connection = connection
        self._peer = peer
        self._behaviours = behaviours
        self._on_end = on_end
        self._call = Call()
        self._is_cancelled = False

    def take_no_more(self) -> None:
        """End once the call under way has been answered; if there is none, now."""
        with suppress(OSError):  # it has ended
            self._connection.shutdown(socket.SHUT_RD)

    def cancel(self) -> None:
        """Cancel the call under way and close the line: also on a client that does not read its answers."""
        with suppress(OSError):  # it has ended
            self._connection.shutdown(socket.SHUT_RDWR)
        self._is_cancelled = True
        self._call.cancel()

    def _serve(self) -> None:
        try:
            while packet := self._connection.recv(MAX_PACKET_BYTES + 1):
                self._connection.send(self._answer(packet).pack())
        except ValueError as error:
            _log.warning("%s sent no direct call: %s", self._peer, error)
        except OSError:
            _log.info("%s has gone in the middle of a call", self._peer)
        finally:
            self._on_end(self)
            self._connection.close()

    def _answer(self, packet: bytes) -> Reply:
        """Return the reply to a packet. Raises ValueError if that is no request."""
        if len(packet) > MAX_PACKET_BYTES:
            raise ValueError(f"a packet of more than {MAX_PACKET_BYTES} bytes")
        request = Request.parse(packet)
        self._call = call = Call(timeout_s=request.timeout_s)
        if self._is_cancelled:  # before there was this call
            call.cancel()
        request_type, serve = self._behaviours[request.method]
        name = request_type.DESCRIPTOR.name.removesuffix("Request")
        _log.debug("%s from %s: begun", name, self._peer)
        try:
            response = encode(serve(decoded(request_type, request.message), call))
            if len(response) > MAX_PACKET_BYTES - _FRAMING_BYTES:
                raise ExhaustedError(
                    f"the response has {len(response)} bytes, too many for a direct call: it is "
                    "to be made by gRPC"
                )
        except Exception as error:
            status = told_as_status(told(error, name, self._peer))
            return Reply(Outcome.FAILED, "", status.SerializeToString())
        ((_, ledger),) = call.ledger.as_metadata()
        return Reply(Outcome.ANSWERED, ledger, response)
