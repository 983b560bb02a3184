"""A client of a server with TLS, which sends damaged bytes, and hears what it is answered."""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.direct.tls_engine import TlsEngine
from tests.fuzz.edits import apply_edits

__all__ = ["TlsPeer"]

_END_S = 20.0
"""How long the server may leave a connection open whose client has ended its half."""

_MOST_ANSWER_BYTES = 16 << 20


class TlsPeer:
    """One connection.

    Args:
        end: The connection. Its owner closes it.
        context: How it is encrypted; None if it is not.
        scripts: How to edit what it sends: each time by the next script, and then no more.
    """

    def __init__(
        self, end: socket.socket, context: ssl.SSLContext | None, scripts: Sequence[bytes] = ()
    ) -> None:
        end.settimeout(_END_S)
        self._end = end
        self._engine = None if context is None else TlsEngine(context, "localhost")
        self._scripts = [*scripts]
        self._buffer = memoryview(bytearray(16 << 10))
        self.received = b""
        self._has_ended = False

    def shake_hands(self, patience_s: float = _END_S) -> bool:
        """Shake hands with the server, and return whether both agree. It gives up if the server says nothing."""
        engine = self._engine
        while engine is not None and not engine.is_established and not self._has_ended:
            try:
                engine.shake_hands()
            except ConnectionClosedError:
                self._has_ended = True
            self._send(engine.take_unsent())
            if not (engine.is_established or self._has_ended or self._receive(patience_s)):
                return False
        return not self._has_ended

    def send(self, data: bytes) -> None:
        """Send some data."""
        self._send(data if self._engine is None else self._engine.encrypt(data))

    def wait(self, is_enough: Callable[[bytes], bool], patience_s: float) -> bool:
        """Receive until an answer is enough, the server ends the connection, or nothing comes. Return whether it is."""
        until_s = time.monotonic() + patience_s
        while not (enough := is_enough(self.received)) and not self._has_ended:
            if not self._receive(until_s - time.monotonic()):
                break
        return enough

    def end(self) -> bytes:
        """End this half, and wait until the server has ended the connection. Return all that it has answered.

        Raises:
            TimeoutError: The server has left it open.
        """
        with suppress(OSError):  # the server has ended it
            self._end.shutdown(socket.SHUT_WR)
        while self._has_more():
            pass
        return self.received

    def _send(self, data: bytes) -> None:
        if data:
            data = apply_edits(data, self._scripts.pop(0) if self._scripts else b"")
            with suppress(BrokenPipeError, ConnectionResetError):  # the server has refused the rest
                self._end.sendall(data)

    def _receive(self, patience_s: float) -> bool:
        """Take what comes, and return whether anything has."""
        ready, _, _ = select.select([self._end], (), (), max(patience_s, 0))
        return bool(ready) and self._has_more()

    def _has_more(self) -> bool:
        try:
            data = self._end.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._has_ended = True
            return False
        if self._engine is None:
            self.received += data
        else:
            self._engine.feed(data)
            self._decrypt(self._engine)
        assert len(self.received) < _MOST_ANSWER_BYTES
        return True

    def _decrypt(self, engine: TlsEngine) -> None:
        with suppress(ConnectionClosedError):
            while engine.is_established and (count := engine.decrypt_into(self._buffer)):
                self.received += self._buffer[:count]
