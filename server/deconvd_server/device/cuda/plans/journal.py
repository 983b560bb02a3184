"""What a process is about, on disk: what it began stays there until it has ended, also if the process dies. No CUDA."""

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
    """Work that a process had begun and not ended when it died.

    Attributes:
        fields: What the work is, as `Journal.begin` was given it.
        crashed: Whether the process died of a fault (SIGFPE, SIGSEGV, SIGBUS, SIGILL, SIGABRT) in the thread that
            had begun the work, or in one that is not Python's. False also if that is not known, as after SIGKILL.
        ended_s: When its journal was last written, in seconds since the epoch.
        path: The journal.
    """

    fields: Mapping[str, Any]
    has_crashed: bool
    ended_s: float
    path: Path


class Journal:
    """This process's file in a folder that other processes may share. Thread-safe.

        begin --> a line, synced to the disk --end--> no line
                                             --death--> a remnant, for others to find

    A process is alive as long as its file is locked. Its id would not tell: ids are used again, and other containers
    have their own. The file has its name only once it is locked. Python's fault handler writes into the file too,
    unless it writes elsewhere already (PYTHONFAULTHANDLER): that is how a crash is told from a kill.

    If a file cannot be written, as on a full disk, there is one warning, and nothing is remembered.

    Args:
        folder: Made at first need, if its parent is there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._file: FileIO | None = None
        self._path: Path | None = None
        self._numbers = itertools.count()
        self._running: set[int] = set()
        self._dead: dict[Path, Sequence[UnfinishedWork]] = {}
        self._has_fault_handler = False
        self._has_warned = False

    def begin(self, fields: Mapping[str, Any]) -> int | None:
        """Note work that the calling thread is about to begin; return its number for `end`, None if it is not noted.

        Args:
            fields: What it is, as JSON has it.
        """
        number = None
        try:
            with self._lock:
                file = self._file or self._open()
                upcoming = next(self._numbers)
                thread = threading.get_ident()
                _append(file, {"begin": upcoming, "thread": thread, "fields": fields})
                self._running.add(upcoming)
                number = upcoming
            os.fsync(file.fileno())
        except OSError as error:
            self._warn(error)
        return number

    def end(self, number: int | None) -> None:
        """Strike out work that has ended."""
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
        """Return what processes were about when they died, in this folder, since its files were last removed."""
        try:
            with self._lock:
                for path in self._folder.glob(f"*{_SUFFIX}"):
                    if path != self._path and path not in self._dead:
                        self._inspect(path)
                return [remnant for remnants in self._dead.values() for remnant in remnants]
        except OSError as error:
            self._warn(error)
            return []

    def close(self) -> None:
        """Remove this process's file: it ends as it should, whatever it is about."""
        with self._lock:
            file, self._file = self._file, None
            if file is None or self._path is None:
                return
            try:
                # before it is unlocked, so that nobody takes it for a dead one's
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
        """Keep what the process of another journal was about if it has died; remove the journal if that is nothing."""
        try:
            remnants = _read_unfinished(path)
        except FileNotFoundError:  # it has just been closed
            return
        if remnants:
            self._dead[path] = remnants
        elif remnants is not None:
            path.unlink(missing_ok=True)

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "what is about to be tried cannot be noted in %s, so a crash would come again: %s",
                self._folder,
                error,
            )


@cache
def process_journal(folder: Path) -> Journal:
    """Return the journal of this process in a folder: its cards have one, as they have one fault handler."""
    return Journal(folder)


def _append(file: FileIO, content: Mapping[str, Any]) -> None:
    # after a line end, as an earlier line may have been cut off where the disk was full
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
    """Return what a journal's process was about when it died; None while it lives."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared with others who look
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
            case _:
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
    """Return whether the fault handler reports a fault, and in no other of Python's threads."""
    is_fault = any(line.startswith("Fatal Python error") for line in report)
    current = [line for line in report if line.startswith("Current thread")]
    return is_fault and all(line.startswith(f"Current thread 0x{thread:016x}") for line in current)
