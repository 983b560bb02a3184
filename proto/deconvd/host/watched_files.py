"""Files whose contents may be replaced while a program runs: certificates, keys and tokens."""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

from deconvd.host.forks import new_lock, register_fork_reset

__all__ = ["WatchedFiles"]

_T = TypeVar("_T")

_Version: TypeAlias = tuple[tuple[int, ...] | None, ...]

_CHECK_PERIOD_S: Final = 1.0
"""How often files are looked at: so long may a change take to count."""

_log = logging.getLogger(__name__)


class WatchedFiles(Generic[_T]):
    """What some files mean, parsed again when they have changed. Thread-safe.

    Files that are replaced one after the other may not match for a moment: while they cannot be parsed, what they meant
    before counts, and the log says so once for each change. The attempt is repeated: files may be unreadable for a
    moment without having changed, for example for want of descriptors.

    Args:
        paths: The files.
        parse: Returns what the files mean. It reads them itself, and raises OSError or ValueError if it cannot.

    Raises:
        OSError, ValueError: They cannot be parsed now, or one of them is a pipe or a device. Who reads those waits for
            whoever writes, and here that would be all calls.
    """

    def __init__(self, paths: Sequence[Path], parse: Callable[[], _T]) -> None:
        self._paths = paths
        self._parse = parse
        self._version: _Version | None = self._stat()
        self._failed_version: _Version | None = None
        self._value = self._read()
        self._check_due_s = time.monotonic() + _CHECK_PERIOD_S
        self.reset_after_fork()
        register_fork_reset(self)

    def reset_after_fork(self) -> None:
        """Have a lock of one's own in a forked child."""
        self._lock = new_lock()

    def current(self) -> _T:
        """Return what the files mean now, or did a second ago at most."""
        if time.monotonic() >= self._check_due_s:
            with self._lock:
                if time.monotonic() >= self._check_due_s:
                    self._check_due_s = time.monotonic() + _CHECK_PERIOD_S
                    self._check()
        return self._value

    def refresh(self) -> _T:
        """Return what the files mean at this very moment."""
        with self._lock:
            self._check()
            return self._value

    def _check(self) -> None:
        version = self._stat()
        if version == self._version:
            return
        try:
            value = self._read()
        except (OSError, ValueError) as error:
            if version != self._failed_version:
                _log.warning(
                    "%s cannot be used, and what was there before still counts: %s",
                    self._names(),
                    error,
                )
            self._failed_version = version
        else:
            if self._stat() != version:
                return  # parts of it may be old and parts new: it is read again at the next look
            _log.info("%s was read again", self._names())
            self._value, self._version, self._failed_version = value, version, None

    def _read(self) -> _T:
        for path in self._paths:
            _refuse_pipe(path)
        return self._parse()

    def _names(self) -> str:
        return ", ".join(map(str, self._paths))

    def _stat(self) -> _Version:
        """Return what changes when a file is replaced or written."""
        return tuple(map(_stat_of, self._paths))


def _refuse_pipe(path: Path) -> None:
    """Raise ValueError for a pipe or a device. What is wrong with a directory, or no file at all, `parse` tells."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path}: it must be a regular file")


def _stat_of(path: Path) -> tuple[int, ...] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    # programs that copy files may set st_mtime, but nobody can set st_ctime
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
