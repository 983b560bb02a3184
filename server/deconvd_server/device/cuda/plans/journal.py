"""A journal on disk of the work that a process has started and not ended. It outlives the process. Needs no CUDA."""

from __future__ import annotations

import atexit
import faulthandler
import fcntl
import itertools
import json
import logging
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, Final

__all__ = ["Journal", "UnfinishedWork", "process_journal"]

log = logging.getLogger(__name__)

_SUFFIX: Final = ".journal"


@dataclass(frozen=True, slots=True)
class UnfinishedWork:
    """Work that a process had started and not ended when it died.

    Attributes:
        fields: The description of the work that `Journal.begin` was given.
        has_crashed: Whether the process died of a fault (SIGFPE, SIGSEGV, SIGBUS, SIGILL, SIGABRT) in the thread that
            had started the work, or in a thread that is not Python's. False also if that is unknown, as after SIGKILL.
        ended_s: When the process's journal was last written, in seconds since the epoch.
        path: The process's journal.
    """

    fields: Mapping[str, Any]
    has_crashed: bool
    ended_s: float
    path: Path


class Journal:
    """This process's file in a folder that other processes may share. Thread-safe.

        begin --> a record, synced to the disk --end----> no record
                                               --death--> unfinished work, which other processes find

    A process is alive as long as its file is locked. Its process id would not do: ids are used again, and other
    containers have ids of their own. The file gets its final name only once it is locked, so no process ever finds it
    unlocked while its owner lives. Python's fault handler writes to the file too, unless it is enabled already
    (PYTHONFAULTHANDLER): its report tells a crash from a kill.

    If the file cannot be written, for example on a full disk, there is one warning, and the work is not noted.

    Args:
        folder: Made when it is first needed. Its parent must exist.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._path: Path | None = None
        self._numbers = itertools.count()
        self._running: set[int] = set()
        self._unfinished: dict[Path, Sequence[UnfinishedWork]] = {}  # by journals of dead processes
        self._has_fault_handler = False
        self._has_warned = False

    def begin(self, fields: Mapping[str, Any]) -> int | None:
        """Note work that the calling thread is about to start. Return its number for `end`; None if it was not noted.

        Args:
            fields: A description of the work, as an object of JSON.
        """
        number = None
        try:
            with self._lock:
                file = self._file or self._open()
                next_number = next(self._numbers)
                thread = threading.get_ident()
                _append(file, {"begin": next_number, "thread": thread, "fields": fields})
                self._running.add(next_number)
                number = next_number
            os.fsync(
                file.fileno()
            )  # outside the lock: it takes long, and other threads note work too
        except OSError as error:
            self._warn(error)
        return number

    def end(self, number: int | None) -> None:
        """Note that work has ended."""
        with self._lock:
            if self._file is None or number is None:
                return
            self._running.discard(number)
            try:
                if self._running:
                    _append(self._file, {"end": number})
                else:
                    self._file.truncate(0)
            except OSError as error:
                self._warn(error)

    def unfinished_work(self) -> list[UnfinishedWork]:
        """Return the unfinished work of all dead processes in the folder."""
        try:
            with self._lock:
                for path in self._folder.glob(f"*{_SUFFIX}"):
                    if path != self._path and path not in self._unfinished:
                        self._inspect(path)
                return [work for of_journal in self._unfinished.values() for work in of_journal]
        except OSError as error:
            self._warn(error)
            return []

    def close(self) -> None:
        """Remove this process's file: a process that exits in order has died in no work."""
        with self._lock:
            file, self._file = self._file, None
            if file is None or self._path is None:
                return
            try:
                # removed before it is unlocked, so that no process takes it for the file of a dead one
                self._path.unlink(missing_ok=True)
            except OSError as error:
                self._warn(error)
            file.close()

    def _open(self) -> FileIO:
        self._folder.mkdir(exist_ok=True)
        name = uuid.uuid4().hex
        unlocked = self._folder / f"{name}.tmp"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = FileIO(os.open(unlocked, flags, 0o644), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path = unlocked.replace(self._folder / f"{name}{_SUFFIX}")
        except OSError:
            file.close()
            unlocked.unlink(missing_ok=True)
            raise
        self._file = file
        atexit.register(self.close)
        if not faulthandler.is_enabled():
            faulthandler.enable(file)
            self._has_fault_handler = True
        _sync(self._folder)
        return file

    def _inspect(self, path: Path) -> None:
        """Remember the unfinished work of another journal whose process has died. Remove a journal that has none."""
        try:
            unfinished = _read_unfinished(path)
        except FileNotFoundError:  # it has just been closed
            return
        if unfinished:
            self._unfinished[path] = unfinished
        elif unfinished is not None:
            path.unlink(missing_ok=True)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "searches for plans cannot be noted in %s, so one that crashes would be repeated: %s",
                self._folder,
                error,
            )


@cache
def process_journal(folder: Path) -> Journal:
    """Return the journal of this process in a folder. All its cards share it, as a process has one fault handler."""
    return Journal(folder)


def _append(file: FileIO, content: Mapping[str, Any]) -> None:
    # It starts with a line end: an earlier record may have been cut off when the disk was full.
    line = f"\n{json.dumps(content)}\n".encode()
    if file.write(line) != len(line):
        raise OSError("the disk is full")


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _read_unfinished(path: Path) -> list[UnfinishedWork] | None:
    """Return the unfinished work of a journal's process if it has died; None if it lives."""
    with path.open("rb") as file:
        try:
            fcntl.flock(
                file, fcntl.LOCK_SH | fcntl.LOCK_NB
            )  # shared: other processes may be reading it too
        except BlockingIOError:
            return None
        text, ended_s = file.read().decode(errors="replace"), os.fstat(file.fileno()).st_mtime
    begun: dict[int, tuple[int, Mapping[str, Any]]] = {}
    report: list[str] = []
    for line in text.splitlines():
        match _parse_line(line):
            case {"begin": int(number), "thread": int(thread), "fields": dict(fields)}:
                begun[number] = thread, fields
            case {"end": int(number)}:
                begun.pop(number, None)
            case _:  # of the fault handler, or cut off
                report.append(line)
    return [
        UnfinishedWork(fields, _has_crashed(thread, report), ended_s, path)
        for thread, fields in begun.values()
    ]


def _parse_line(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _has_crashed(thread: int, report: Sequence[str]) -> bool:
    """Return whether the fault handler's report is of a fault in a thread, or in one that is not Python's."""
    is_fault = any(line.startswith("Fatal Python error") for line in report)
    current = [line for line in report if line.startswith("Current thread")]
    return is_fault and all(line.startswith(f"Current thread 0x{thread:016x}") for line in current)
