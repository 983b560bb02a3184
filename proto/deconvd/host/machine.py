"""How much memory and how many processors this process may use, by the host, its cgroups and its affinity.

Processes that serve as one have equal parts of that.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = ["PARTS_VARIABLE", "memory_bytes", "processors_count", "used_bytes"]

PARTS_VARIABLE: Final = "_DECONVD_PARTS"
"""The environment variable that says how many processes share the machine as equals. A supervisor sets it."""

_ROOT: Final = Path("/")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


def memory_bytes(root: Path = _ROOT) -> int:
    """Return how much memory this process may use: the host's, or its cgroups' limit if that is less.

    The limits are those of the process's cgroup and of all its ancestors that can be seen: ``memory.max`` in
    version 2, and ``memory.limit_in_bytes`` in version 1, whose ``memory.stat`` also has the limits of ancestors that
    cannot be seen.

    Args:
        root: Folder that ``/proc`` and the cgroup mounts are in, for tests.
    """
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([host_bytes, *_limits(root, "memory", _memory_limits)]) // _parts_count()


def used_bytes() -> int:
    """Return how much memory this process has in use, without files and shared memory."""
    resident_pages, shared_pages = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident_pages) - int(shared_pages)) * mmap.PAGESIZE


def processors_count(root: Path = _ROOT) -> int:
    """Return how many processors this process may keep busy: by its affinity, or by its cgroups' quota if that is less.

    A quota is rounded up: two threads can use one and a half processors. Quotas are ``cpu.max`` in version 2, and
    ``cpu.cfs_quota_us`` divided by ``cpu.cfs_period_us`` in version 1.

    Args:
        root: Folder that ``/proc`` and the cgroup mounts are in, for tests.
    """
    count = min([len(os.sched_getaffinity(0)), *_limits(root, "cpu", _processor_limits)])
    return max(count // _parts_count(), 1)


def _parts_count() -> int:
    return int(os.environ.get(PARTS_VARIABLE, "1"))


def _limits(
    root: Path, controller: str, limits_in: Callable[[Path], Iterable[int]]
) -> Iterator[int]:
    """Yield the limits of all cgroups that this process is in. Files that cannot be read set no limit."""
    with suppress(OSError):
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = [_Mount.of(line) for line in _mount_lines(root)]
        for path, is_hierarchy in _hierarchies(memberships, controller):
            for folder in _folders([mount for mount in mounts if is_hierarchy(mount)], path):
                yield from limits_in(root / folder.relative_to("/"))


def _mount_lines(root: Path) -> Iterator[str]:
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        if " - cgroup" in line:
            yield line


@dataclass(frozen=True)
class _Mount:
    """A mount of a cgroup hierarchy, from a line of proc_pid_mountinfo(5).

    Attributes:
        root: The cgroup that is visible at `point`.
        options: In version 1, the names of its controllers.
    """

    root: PurePosixPath
    point: PurePosixPath
    is_version_2: bool
    options: frozenset[str]

    @staticmethod
    def of(line: str) -> _Mount:
        before, _, after = line.partition(" - ")
        root, point = (PurePosixPath(_unescape(field)) for field in before.split()[3:5])
        kind, *_, options = after.split()
        return _Mount(root, point, kind == "cgroup2", frozenset(options.split(",")))


def _unescape(field: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), field)


def _hierarchies(
    memberships: Iterable[str], controller: str
) -> Iterator[tuple[PurePosixPath, Callable[[_Mount], bool]]]:
    """Yield this process's cgroup in each hierarchy that may limit it, and which mounts belong to that hierarchy."""
    for line in memberships:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield PurePosixPath(path), lambda mount: mount.is_version_2
        elif controller in controllers.split(","):
            yield (
                PurePosixPath(path),
                lambda mount: not mount.is_version_2 and controller in mount.options,
            )


def _folders(mounts: Iterable[_Mount], path: PurePosixPath) -> Iterator[PurePosixPath]:
    """Yield the folders of a cgroup and its ancestors, up to the topmost that is visible.

    In a container the mount often begins at the container's own cgroup, while `path` may be as seen from outside. Then
    no mount contains `path`, and the mount's own root is the cgroup.
    """
    seen = [
        mount.point / path.relative_to(mount.root)
        for mount in mounts
        if path.is_relative_to(mount.root) and ".." not in path.parts
    ]
    for folder in seen or [mount.point for mount in mounts]:
        yield folder
        points = {mount.point for mount in mounts}
        while folder not in points:
            folder = folder.parent
            yield folder


def _memory_limits(folder: Path) -> Iterator[int]:
    yield from _numbers(folder / "memory.max")
    yield from _numbers(folder / "memory.limit_in_bytes")
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == "hierarchical_memory_limit" and value.isdecimal():
            yield int(value)


def _processor_limits(folder: Path) -> Iterator[int]:
    match [*_numbers(folder / "cpu.max")]:
        case [quota_us, period_us] if period_us > 0:
            yield -(-quota_us // period_us)
    match [*_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")]:
        case [quota_us, period_us] if period_us > 0:
            yield -(-quota_us // period_us)


def _numbers(file: Path) -> Iterator[int]:
    """Yield the numbers in a file. "max" and -1 mean that there is no limit, and are left out."""
    for line in _lines(file):
        yield from (int(word) for word in line.split() if word.isdecimal())


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # the file belongs to the other version of cgroups, or may not be read
        return []
