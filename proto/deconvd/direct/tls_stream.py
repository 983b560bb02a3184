"""Sockets with TLS as byte streams. See `deconvd.direct.byte_stream`."""

from __future__ import annotations

import math
import os
import socket
import time
from contextlib import suppress
from typing import Final

from deconvd.direct.byte_stream import SocketStream, receive_flags
from deconvd.direct.connection_errors import ConnectionClosedError
from deconvd.direct.tls_engine import MAX_RECORD_BYTES, TlsEngine
from deconvd.wire.codec import Buffer

__all__ = ["TlsStream"]

_MAX_JOINED_BYTES: Final = 32 << 10
"""Up to this size, joining buffers costs less than records of their own."""

_BATCH_BYTES: Final = 256 << 10
"""How much of a large transfer is encrypted or decrypted at once, and sent or received by one system call.

It stays in the processor's cache on its way. OpenSSL keeps memory for that much, and a third more, in each connection
and direction that has moved it.
"""

_MIN_BATCH_BYTES: Final = 2 * MAX_RECORD_BYTES
"""From this size on, what is received is received in batches."""

_NO_WAIT: Final = receive_flags(may_wait=False)

_CUT: Final = "the connection was cut: its peer has not said that it ends"

_spare_buffers: Final[list[memoryview]] = []
"""Buffers for `_BATCH_BYTES`, which the streams of a process share: few receive at the same time."""

_MAX_SPARE_BUFFERS: Final = 8


class TlsStream(SocketStream):
    """A stream socket whose bytes are encrypted, as a byte stream.

    One thread reads or polls while another writes. What OpenSSL has received counts as arrived: polls and waits decrypt
    it, so that messages of TLS itself are not mistaken for data. A connection that ends without a word of TLS has been
    cut. That is an error as every end is, and its message tells.

    Args:
        connection, stall_limit_s: As of `SocketStream`.
        engine: It encrypts and decrypts. Its handshake is complete, or `shake_hands` is called first.
    """

    def __init__(
        self, connection: socket.socket, engine: TlsEngine, *, stall_limit_s: float = math.inf
    ) -> None:
        super().__init__(connection, stall_limit_s=stall_limit_s)
        self._engine = engine
        self._process = os.getpid()
        self._is_writing = False  # also after a write that has failed midway
        self._failure = ""
        self._received = memoryview(bytearray(MAX_RECORD_BYTES))
        self._ahead = memoryview(bytearray(MAX_RECORD_BYTES))  # what polls have decrypted
        self._ahead_begin = self._ahead_end = 0

    def shake_hands(self) -> None:
        """Complete the handshake by the deadline.

        Raises:
            ConnectionClosedError, ConnectionTimeoutError: It has failed.
        """
        while not self._engine.is_established:
            try:
                is_complete = self._engine.shake_hands()
            except ConnectionClosedError:
                with suppress(OSError):  # the peer may be gone; else it is told why
                    super().write(self._engine.take_unsent())
                raise
            super().write(self._engine.take_unsent())
            if not is_complete:
                self._engine.feed(self._receive())

    def read_into(self, target: memoryview) -> int:
        """See `ByteStream`."""
        if self._ahead_end:
            return self._take_ahead(target)
        engine = self._engine
        count = engine.decrypt_into(target) if engine.has_received else 0
        while not count:
            count = engine.decrypt_into(target, self._receive())
        return count

    def fill(self, target: memoryview) -> None:
        """See `ByteStream`. Large targets are filled record by record, without a copy on the way."""
        while target:
            if self._ahead_end or self._engine.has_received or len(target) < _MIN_BATCH_BYTES:
                count = self.read_into(target)
            else:
                count = self._receive_batch(target)
            target = target[count:]

    def write(self, *buffers: Buffer) -> None:
        """See `ByteStream`."""
        encrypt = self._engine.encrypt
        self._is_writing = True
        if len(buffers) > 1 and sum(map(len, buffers)) <= _MAX_JOINED_BYTES:
            buffers = (b"".join(buffers),)
        if len(buffers) == 1 and len(buffers[0]) <= _BATCH_BYTES:
            super().write(encrypt(buffers[0]))
        else:
            batch: list[bytes] = []
            batch_bytes = 0
            for buffer in buffers:
                for begin in range(0, len(buffer), _BATCH_BYTES):
                    batch.append(encrypt(memoryview(buffer)[begin : begin + _BATCH_BYTES]))
                    batch_bytes += len(batch[-1])
                    if batch_bytes >= _BATCH_BYTES:
                        super().write(*batch)
                        batch, batch_bytes = [], 0
            super().write(*batch)
        self._is_writing = False

    def poll(self, timeout_s: float) -> bool:
        """See `ByteStream`. What has arrived is decrypted: TLS sends records that have no data, too."""
        if self._ahead_end or self._failure or (self._engine.has_received and self._look_ahead()):
            return True
        if timeout_s <= 0:
            return self._is_readable(0) and self._receive_ready()
        until_s = time.monotonic() + timeout_s
        while super().poll(timeout_s):
            if self._receive_ready():
                return True
            timeout_s = until_s - time.monotonic()
            if timeout_s <= 0:
                break
        return False

    def wait(self) -> None:
        """See `ByteStream`."""
        has_come = self.poll(0)
        while not has_come:
            self._wait_until_ready(self._is_readable)
            has_come = self._receive_ready()

    def half_close_and_drain(self, timeout_s: float) -> None:
        """See `ByteStream`."""
        self._say_end()
        super().half_close_and_drain(timeout_s)

    def close(self) -> None:
        """See `ByteStream`. The peer is told, unless this is a child process, whose parent has the connection."""
        if os.getpid() == self._process:
            self._say_end()
        super().close()

    def _look_ahead(self, received: memoryview | None = None) -> bool:
        """Decrypt what has been received, and return whether there is data in it, or the end.

        Args:
            received: What has just come from the network.
        """
        try:
            self._ahead_end = self._engine.decrypt_into(self._ahead, received)
        except ConnectionClosedError as error:
            self._failure = str(error)
            return True
        return self._ahead_end > 0

    def _take_ahead(self, target: memoryview) -> int:
        begin = self._ahead_begin
        count = min(self._ahead_end - begin, len(target))
        target[:count] = self._ahead[begin : begin + count]
        if begin + count == self._ahead_end:
            self._ahead_begin = self._ahead_end = 0
        else:
            self._ahead_begin = begin + count
        return count

    def _receive_ready(self) -> bool:
        """Take what has come from the network, without waiting. Return whether there is data in it, or the end."""
        try:
            count = self._socket.recv_into(self._received, 0, _NO_WAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno is None:
                raise  # raised by a signal handler
            self._failure = f"the connection broke: {error}"
            return True
        if not count:
            self._failure = _CUT
            return True
        return self._look_ahead(self._received[:count])

    def _receive(self) -> memoryview:
        """Wait for more from the network, and return it."""
        if self._failure:
            raise ConnectionClosedError(self._failure)
        flags = 0 if self._may_wait() else _NO_WAIT
        count = self._transfer(
            self._socket.recv_into, (self._received, 0, flags), self._is_readable
        )
        if not count:
            raise ConnectionClosedError(_CUT)
        return self._received[:count]

    def _receive_batch(self, target: memoryview) -> int:
        """Fill the start of a large target with what comes next. Return how many bytes, maybe none yet.

        What is still to come is larger than the data in it. So the system call can wait for as many bytes as are
        missing, less those of a record whose begin is in OpenSSL already.
        """
        try:
            buffer = _spare_buffers.pop()
        except IndexError:
            buffer = memoryview(bytearray(_BATCH_BYTES))
        most_bytes = min(_BATCH_BYTES, len(target) - MAX_RECORD_BYTES)
        flags = receive_flags(may_wait=self._may_wait_for(len(target)), for_all=True)
        count = self._transfer(
            self._socket.recv_into, (buffer[:most_bytes], 0, flags), self._is_readable
        )
        if not count:
            raise ConnectionClosedError(_CUT)
        filled = self._engine.decrypt_into(target, buffer[:count])
        if len(_spare_buffers) < _MAX_SPARE_BUFFERS:
            _spare_buffers.append(buffer)
        return filled

    def _say_end(self) -> None:
        """Tell the peer that nothing more comes, if that can be done without waiting."""
        if not self._is_writing:
            self._is_writing = True  # nothing can be written after it
            with suppress(OSError):  # the connection has ended, or the peer takes nothing
                self._socket.send(self._engine.end(), _NO_WAIT)
