"""When memory that other processes have, too, is gone: the kernel alone knows who has it."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Final

__all__ = ["MemfdWatcher"]

_EVENT: Final = struct.Struct("iIII")
"""inotify_event(7), without a name: number of the watch, mask, cookie, length of the name."""

_DELETE_SELF: Final = 0x400
_IGNORED: Final = 0x8000  # always the last event of a watch
_READ_BYTES: Final = 4096

_libc = ctypes.CDLL(None, use_errno=True)

_Callback = Callable[[], None]


class MemfdWatcher:
    """Tells when memfds are gone: when no process has a descriptor or a mapping of one any more. Thread-safe.

    A descriptor may be in another process, in a message that nobody has read, or lead to the file only (O_PATH); a
    mapping may be a forked child's. inotify knows: it watches the file without keeping it, and tells of its end as of
    any file's that was deleted. Its queue is read whenever someone asks or waits.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inotify: int | None = None  # opened at the first need: a user may have 128
        self._is_closed = False
        self._callbacks: dict[int, _Callback | None] = {}

    def watch(self, descriptor: int) -> int:
        """Watch a memfd from now on, and return the number of the watch, to be given to `when_gone` once.

        Raises:
            OSError: The system has no watch to give.
        """
        with self._lock:
            if self._inotify is None:
                self._inotify = _check_errno(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
            path = f"/proc/self/fd/{descriptor}".encode()
            number = _check_errno(_libc.inotify_add_watch(self._inotify, path, _DELETE_SELF))
            self._callbacks[number] = None
            return number

    def on_gone(self, number: int, then: _Callback) -> None:
        """Call `then` once the file of a watch is gone: now, or in the thread of a later `look`. When closed, now."""
        with self._lock:
            is_gone = self._is_closed or number not in self._callbacks
            if not is_gone:
                self._callbacks[number] = then
        if is_gone:
            then()
        else:
            self.poll()

    def poll(self) -> None:
        """Do what waits for files that have gone."""
        with self._lock:
            due = [self._callbacks.pop(number) for number in self._read_ended()]
        for then in due:
            if then is not None:
                then()

    def close(self) -> None:
        """Watch nothing any more, and do what waits."""
        with self._lock:
            self._is_closed = True
            inotify, self._inotify = self._inotify, None
            due, self._callbacks = [*self._callbacks.values()], {}
        if inotify is not None:
            os.close(inotify)
        for then in due:
            if then is not None:
                then()

    def _read_ended(self) -> Iterator[int]:
        """Yield the numbers of watches that have ended since the last time."""
        if self._inotify is None:
            return
        with suppress(BlockingIOError):
            while events := os.read(self._inotify, _READ_BYTES):
                for number, mask, _, _ in _EVENT.iter_unpack(events):
                    if mask & _IGNORED and number in self._callbacks:
                        yield number


def _check_errno(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
