"""Tells when no process has a memfd any more: only the kernel knows that."""

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
"""inotify_event(7) without a name: number of the watch, mask, cookie, length of the name."""

_DELETE_SELF: Final = 0x400  # IN_DELETE_SELF: the last descriptor and mapping of the file are gone
_IGNORED: Final = 0x8000  # IN_IGNORED: always the last event of a watch
_READ_BYTES: Final = 4096

_libc = ctypes.CDLL(None, use_errno=True)

_Callback = Callable[[], None]


class MemfdWatcher:
    """Tells when memfds are gone: when no process has a descriptor or a mapping of one. Thread-safe.

    A descriptor may be in another process, or in a message that nobody has read; a mapping may be a
    forked child's. Only inotify sees all of these: it watches a file without keeping it alive, and
    reports when the kernel deletes it. Its queue is read in `poll` and `on_gone`, so no thread is needed.
    Callbacks are called without the lock: they take locks of their own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inotify: int | None = None  # opened when first needed: a user may have only 128
        self._is_closed = False
        self._callbacks: dict[int, _Callback | None] = {}

    def watch(self, descriptor: int) -> int:
        """Watch a memfd, and return the number of the watch, which must be given to `on_gone` once.

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
        """Call `then` once the file of a watch is gone: now, or in the thread of a later `poll` or `close`."""
        with self._lock:
            is_gone = self._is_closed or number not in self._callbacks
            if not is_gone:
                self._callbacks[number] = then
        if is_gone:
            then()
        else:
            self.poll()

    def poll(self) -> None:
        """Run the callbacks of all files that have gone."""
        with self._lock:
            due = [self._callbacks.pop(number) for number in self._read_ended()]
        for then in due:
            if then is not None:
                then()

    def close(self) -> None:
        """Stop watching, and run all callbacks that are left."""
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
        """Yield the numbers of watches that have ended since the last call. The caller holds the lock."""
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
