"""The stream of the server's log: a reader that stands still costs messages, and no calls."""

from __future__ import annotations

import os
import select
from typing import Final

__all__ = ["LogStream"]

_PATIENCE_S: Final = 0.5
"""How long a message waits for a reader that was quick enough until now."""

_PIECE_BYTES: Final = select.PIPE_BUF
"""A pipe that `poll` calls writable takes that many bytes at once."""


class LogStream:
    """Writes texts to a file descriptor. Not thread-safe: the lock of its handler guards it.

    Whoever reads a pipe or a socket can stop reading. Then a write would wait with the handler's lock held. So would
    every call, and the thread that obeys signals. So a text that cannot be written in half a second is lost, and
    those after it are lost at once, until the reader goes on.

    Args:
        descriptor: Where to write. It stays open.
        encoding: The encoding of the texts.

    Attributes:
        lost_count: How many texts were lost. Whoever has told that sets it to 0.
    """

    def __init__(self, descriptor: int, encoding: str) -> None:
        self._descriptor = descriptor
        self._encoding = encoding
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self._is_stuck = False
        self._is_cut = False  # amid a line
        self.lost_count: int = 0

    def is_ready(self) -> bool:
        """Return whether a text would be written at once."""
        return bool(self._poll.poll(0))

    def write(self, text: str) -> None:
        """Write a text that ends with a line, or lose it.

        Raises:
            OSError: It cannot be written: nobody has the other end open, or the disk is full.
        """
        data = text.encode(self._encoding, "backslashreplace")
        if self._is_cut:
            data = b"\n" + data
        left = memoryview(data)
        while left:
            if not self._poll.poll(0 if self._is_stuck else _PATIENCE_S * 1000):
                self._is_stuck = True
                self._is_cut = self._is_cut or len(left) < len(data)
                self.lost_count += 1
                return
            self._is_stuck = False
            left = left[os.write(self._descriptor, left[:_PIECE_BYTES]) :]
        self._is_cut = False

    def flush(self) -> None:
        """Do nothing: nothing is buffered here."""
