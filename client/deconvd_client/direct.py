"""Direct calls to a server on this host. See `deconvd.direct`."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from typing import Final

from google.rpc import status_pb2

from deconvd.direct import MAX_PACKET_BYTES, Method, Outcome, Reply, Request
from deconvd.errors import CallCancelledError, DeadlineError
from deconvd.status import error_from_status

__all__ = ["DirectLines"]

_RETRY_S: Final = 5.0
"""How long a server that takes no direct calls is left in peace."""

_CONNECT_S: Final = 0.5
"""How long a server may take to let a line be opened; calls go by gRPC then."""

_IDLE_COUNT: Final = 8
"""Lines that are kept for later calls."""

_TIMEVAL: Final = struct.Struct("@ll")

_log = logging.getLogger(__name__)


class DirectLines:
    """Sockets by which calls are made directly, one at a time on each. Thread-safe.

    Args:
        path: Of the server's socket for direct calls; there need be none.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._idle: list[socket.socket] = []
        self._busy: set[socket.socket] = set()
        self._owner = os.getpid()
        self._is_closed = False
        self._next_try_s = 0.0

    def call(self, method: Method, message: bytes, timeout_s: float) -> Reply | None:
        """Return the answer to a call; None if it is to be made in another way.

        Args:
            message: The request.

        Raises:
            DeconvdError: What the server raised.
            DeadlineError: There was no answer in time.
            CallCancelledError: `close` was called meanwhile.
        """
        packet = Request(method, timeout_s, message).pack()
        line = self._taken() if len(packet) <= MAX_PACKET_BYTES else None
        if line is None:
            return None
        is_whole = False
        try:
            answer = _answer(line, packet, timeout_s)
            is_whole = answer is not None
        finally:
            self._give_back(line, is_whole=is_whole)
        if answer is None:
            if self._is_closed:
                raise CallCancelledError("the connection is closed")
            return None
        if answer.outcome is Outcome.FAILED:
            raise error_from_status(status_pb2.Status.FromString(answer.message))
        return answer

    def close(self) -> None:
        """Close all lines. Calls under way end with CallCancelledError."""
        with self._lock:
            self._is_closed = True
            for line in self._idle:
                line.close()
            for line in self._busy:
                with suppress(OSError):  # the server has closed it
                    line.shutdown(socket.SHUT_RDWR)
            self._idle.clear()

    def _taken(self) -> socket.socket | None:
        if self._owner != os.getpid():
            self._begin_in_child()
        with self._lock:
            line = self._idle.pop() if self._idle else None
        line = line or self._opened()
        with self._lock:
            if line is not None and not self._is_closed:
                self._busy.add(line)
                return line
        if line is not None:
            line.close()
        return None

    def _give_back(self, line: socket.socket, *, is_whole: bool) -> None:
        with self._lock:
            self._busy.discard(line)
            if is_whole and not self._is_closed and len(self._idle) < _IDLE_COUNT:
                self._idle.append(line)
            else:
                line.close()

    def _opened(self) -> socket.socket | None:
        if self._is_closed or time.monotonic() < self._next_try_s:
            return None
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET_BYTES)
            # a server that is stopped lets callers wait once it has many
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(_CONNECT_S))
            line.connect(self._path)
        except OSError as error:
            _log.debug("no direct calls by %s: %s", self._path, error)
            self._next_try_s = time.monotonic() + _RETRY_S
            line.close()
            return None
        return line

    def _begin_in_child(self) -> None:
        """Leave the lines to the parent: this is a forked child, where a lock may be held by no one."""
        self._lock = threading.Lock()
        self._idle = []
        self._busy = set()
        self._owner = os.getpid()


def _answer(line: socket.socket, packet: bytes, timeout_s: float) -> Reply | None:
    """Return the answer to a packet; None if the server has closed the line.

    Raises:
        DeadlineError: There was none in time.
    """
    try:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(max(timeout_s, 1e-3)))
        line.send(packet)
    except OSError:
        return None
    try:
        data = line.recv(MAX_PACKET_BYTES)
    except BlockingIOError:
        raise DeadlineError("the server did not answer in time") from None
    except OSError:
        return None
    try:
        return Reply.parse(data) if data else None
    except ValueError as error:
        _log.warning("what the server answers to direct calls makes no sense: %s", error)
        return None


def _timeval(seconds: float) -> bytes:
    return _TIMEVAL.pack(int(seconds), int(seconds % 1 * 1e6))
