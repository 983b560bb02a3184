"""Processes: what they take of their host, as the kernel counts it, and forked children."""

from __future__ import annotations

import os
import posix
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

__all__ = [
    "MemoryPeak",
    "ProcessResources",
    "children_of",
    "descriptors_count",
    "end_forked_child",
    "exit_code",
    "is_idle",
    "leaves_no_descriptor",
    "lent_bytes",
    "limit_address_space",
    "memory_bytes",
    "peak_memory_bytes",
    "process_resources",
    "processor_s",
    "wait_until",
    "watch_memory",
]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SAMPLE_S = 0.02
_REST_S = 0.4
_TIMEOUT_S = 60.0
_CHILD_S = 60
"""More than a forked child takes for its work; one that hangs is killed then."""


@dataclass(frozen=True)
class ProcessResources:
    """What a process holds at one moment."""

    memory_bytes: int
    descriptors_count: int
    threads_count: int


def process_resources(pid: int) -> ProcessResources:
    """Return what a process holds now."""
    return ProcessResources(
        memory_bytes(pid),
        descriptors_count=len(os.listdir(f"/proc/{pid}/fd")),
        threads_count=len(os.listdir(f"/proc/{pid}/task")),
    )


def memory_bytes(pid: int) -> int:
    """Return what a process holds of the host's memory, memory that it shares included."""
    resident_pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    return int(resident_pages) * _PAGE_BYTES


def is_idle(pid: int) -> bool:
    """Return whether a process does next to nothing for a moment."""
    before_s = processor_s(pid)
    time.sleep(_REST_S)
    return processor_s(pid) - before_s < _REST_S / 4


def processor_s(pid: int) -> float:
    """Return how long a process has computed, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lent_bytes(pid: int) -> int:
    """Return how much a server has mapped of the memory that it lends."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    ranges = [line.split("-", 1) for line in maps if "/memfd:deconvd" in line]
    return sum(int(end.split()[0], 16) - int(begin, 16) for begin, end in ranges)


def limit_address_space(pid: int, spare_bytes: int) -> None:
    """Let a process map only so much more than it has mapped."""
    pages_count = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    limit_bytes = pages_count * _PAGE_BYTES + spare_bytes
    resource.prlimit(pid, resource.RLIMIT_AS, (limit_bytes, limit_bytes))


def peak_memory_bytes(pid: int) -> int:
    """Return the most that a process has ever held."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


@dataclass
class MemoryPeak:
    """What this process held at first, and the most since, to a few hundredths of a second."""

    first_bytes: int
    most_bytes: int

    @property
    def grown_bytes(self) -> int:
        """How much more that was than at first."""
        return self.most_bytes - self.first_bytes


@contextmanager
def watch_memory() -> Iterator[MemoryPeak]:
    """Watch what this process holds for the block."""
    peak = MemoryPeak(memory_bytes(os.getpid()), 0)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_S):
            peak.most_bytes = max(peak.most_bytes, memory_bytes(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


def end_forked_child(code: int) -> NoReturn:
    """End a forked child at once.

    Not by `os._exit`, which coverage replaces: it saves what it has counted, with locks that another thread may have
    held when the parent forked.
    """
    posix._exit(code)


def exit_code(work: Callable[[], bool], *, timeout_s: int = _CHILD_S) -> int:
    """Return 0 if `work` returns True in a forked child, which is killed after a time."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(timeout_s)
        code = 2
        try:
            code = 0 if work() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            end_forked_child(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def children_of(parent: int) -> list[int]:
    """Return the ids of a process's children.

    The kernel's own list, /proc/PID/task/*/children, may lack some while others begin or end.
    """
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent:
                children.append(int(stat.parent.name))
    return children


def descriptors_count() -> int:
    """Return how many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def leaves_no_descriptor() -> Iterator[None]:
    """Fail if this process keeps descriptors that the block has opened. Threads of other tests may close theirs."""
    before = descriptors_count()
    yield
    wait_until(lambda: descriptors_count() <= before)


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float = _TIMEOUT_S, pause_s: float = _SAMPLE_S
) -> None:
    """Wait for what must come true soon.

    Args:
        timeout_s: How long at most, in seconds.
        pause_s: How long to wait before it is looked at again: what takes much to look at should not be in the way.
    """
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(pause_s)
