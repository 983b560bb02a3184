"""The lock on a Unix socket's path: of several servers that start or end there, one looks and acts at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from deconvd_server.resources.socket_file import AddressInUseError

__all__ = ["lock_path"]

_LOCK_S: Final = 10.0
"""Longer than another server takes to start or to end on a socket."""

_LOCK_POLL_S: Final = 0.02
"""How often the lock is tried: another server holds it for milliseconds."""

_NO_LOCK: Final = -1
"""Stands for the descriptor of a lock where none can be had. See `_try_lock`."""


@contextmanager
def lock_path(path: Path) -> Iterator[None]:
    """Keep other servers from a socket's path for the block.

    Otherwise two servers that start at once could both find the socket dead, and the second would remove the socket of
    the first. The lock is on a file of its own, which only this user can read: a user who may read a file or a
    directory may lock it for as long as he likes.

    Raises:
        AddressInUseError: Another server of this user has held the lock for too long.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    deadline_s = time.monotonic() + _LOCK_S
    while (descriptor := _try_lock(lock_path)) is None:
        if time.monotonic() > deadline_s:
            text = f"another server has been starting or ending there for {_LOCK_S:g} s"
            raise AddressInUseError(errno.EADDRINUSE, text, str(path))
        time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        if descriptor != _NO_LOCK:
            lock_path.unlink(missing_ok=True)
            os.close(descriptor)


def _try_lock(path: Path) -> int | None:
    """Return the descriptor of a lock; None while another server has it.

    Return _NO_LOCK if no lock is possible. Where no file can be made, no socket can be made either. And a file that
    another user has put there must not keep a server from its socket.
    """
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o600)
    except OSError:
        return _NO_LOCK
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        return _NO_LOCK
    with suppress(BlockingIOError, FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(
            path.lstat(), os.fstat(descriptor)
        ):  # and the file was not removed since
            return descriptor
    os.close(descriptor)
    return None
