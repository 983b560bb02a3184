"""The cubins on disk that servers of one user have compiled: a folder that nobody else can write to. Needs no card.

FOLDER/<name>.cubin    a digest of the name and the machine code, 32 bytes, and the machine code

Machine code from here runs in the server, so the folder and its files must be the user's own. Files are written under
another name and renamed, so servers that start at once never read half a file; the last one to write stays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

__all__ = ["CubinCache", "default_folder"]

_log = logging.getLogger(__name__)

_SUFFIX: Final = ".cubin"

_LIMIT_BYTES: Final = 256 << 20
"""Some 5000 modules, far more than the strides and types that one service meets."""

_STALE_S: Final = 3600.0
"""A file that was being written this long ago is of a server that died."""

_DIGEST_BYTES: Final = 32


class _UntrustedError(Exception):
    """A folder or file that other users may have written to."""


class CubinCache:
    """Keeps cubins on disk, by name. What cannot be read or written is compiled again, after one warning. Thread-safe.

    Args:
        folder: Made, with its parents, when it is first written to.
        limit_bytes: Bound on the files. Those that were not used for the longest time are deleted.
    """

    def __init__(self, folder: Path, limit_bytes: int = _LIMIT_BYTES) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._has_warned = False

    def load(self, name: str) -> bytes | None:
        """Return a cubin; None if there is none, or none that can be trusted."""
        try:
            with self._open_folder() as folder:
                content = _read(folder, name + _SUFFIX)
        except FileNotFoundError:
            return None
        except (OSError, _UntrustedError) as error:
            self._warn(error)
            return None
        digest, cubin = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if _digest(name, cubin) == digest:
            return cubin
        _log.warning("%s is damaged, and is compiled again", self._folder / (name + _SUFFIX))
        return None

    def save(self, name: str, cubin: bytes) -> None:
        """Keep a cubin if there is a folder for it."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._open_folder() as folder:
                _write(folder, name + _SUFFIX, _digest(name, cubin) + cubin)
                with self._lock:
                    self._trim(folder)
        except (OSError, _UntrustedError) as error:
            self._warn(error)

    @contextmanager
    def _open_folder(self) -> Iterator[int]:
        """Give the folder's descriptor: a folder that replaces it meanwhile is not looked at."""
        number = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _check_owner(number, str(self._folder))
            yield number
        finally:
            os.close(number)

    def _trim(self, folder: int) -> None:
        """Delete the files that were not used for the longest time, until the others are within the bound."""
        files = []
        for name in os.listdir(folder):
            with suppress(FileNotFoundError):  # another server has just deleted it
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if name.endswith(_SUFFIX):
                    files.append((status.st_mtime, name, status.st_size))
                elif name.endswith(".tmp") and status.st_mtime < time.time() - _STALE_S:
                    os.unlink(name, dir_fd=folder)
        excess_bytes = sum(size_bytes for _, _, size_bytes in files) - self._limit_bytes
        for _, name, size_bytes in sorted(files):
            if excess_bytes <= 0:
                return
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)
            excess_bytes -= size_bytes

    def _warn(self, error: Exception) -> None:
        with self._lock:
            is_news, self._has_warned = not self._has_warned, True
        if is_news:
            _log.warning(
                "compiled kernels are not kept in %s, so each start compiles those that it needs: %s",
                self._folder,
                error,
            )


def default_folder() -> Path:
    """Return the folder in the user's caches: in ``XDG_CACHE_HOME``, or else in ``~/.cache``."""
    caches = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(caches) if os.path.isabs(caches) else Path(os.path.expanduser("~/.cache"))
    return base / "deconvd" / "kernels"


def _digest(name: str, cubin: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + cubin).digest()


def _check_owner(number: int, what: str) -> None:
    status = os.fstat(number)
    if status.st_uid != os.geteuid():
        raise _UntrustedError(f"{what} is of user {status.st_uid}, not of the server's user")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise _UntrustedError(f"other users may write to {what}: chmod go-w")


def _read(folder: int, name: str) -> bytes:
    number = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    with os.fdopen(number, "rb") as file:
        _check_owner(number, name)
        with suppress(OSError):  # on a read-only folder the order of use stays as it is
            os.utime(number)
        return file.read()


def _write(folder: int, name: str, content: bytes) -> None:
    unfinished = f"{uuid.uuid4().hex}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    number = os.open(unfinished, flags, 0o600, dir_fd=folder)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content)
        os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        os.unlink(unfinished, dir_fd=folder)
        raise
