"""What the machine leaves to this process: memory and processors, of the host, the cgroup and the affinity."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

__all__ = ["memory_bytes", "processors_count"]

_ROOT: Final = Path("/")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")


def memory_bytes(root: Path = _ROOT) -> int:
    """Return how much memory this process may fill: the host's, or the limit of its cgroups where that is less.

    Limits are those of the process's cgroup and all above it that can be seen from here: ``memory.max`` of version 2,
    ``memory.limit_in_bytes`` of version 1, whose ``memory.stat`` tells of those that cannot be seen, too.

    Args:
        root: Where ``/proc`` and the mounts of cgroups are, for tests.
    """
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([host_bytes, *_limits(root, "memory", _memory_limits)])


def processors_count(root: Path = _ROOT) -> int:
    """Return how many processors this process may keep busy: those of its affinity, or fewer by its cgroups' quota.

    A quota is rounded up: one and a half processors are used by two threads. Quotas are those of ``cpu.max`` in
    version 2, and of ``cpu.cfs_quota_us`` over ``cpu.cfs_period_us`` in version 1.

    Args:
        root: Where ``/proc`` and the mounts of cgroups are, for tests.
    """
    return max(min([len(os.sched_getaffinity(0)), *_limits(root, "cpu", _processor_limits)]), 1)


def _limits(
    root: Path, controller: str, limits_in: Callable[[Path], Iterable[int]]
) -> Iterator[int]:
    """Yield the limits of all cgroups that bind this process. What cannot be read is no limit."""
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
    """A mount of cgroups, as proc_pid_mountinfo(5) has it.

    Attributes:
        root: The cgroup that is seen at `point`.
        options: Of version 1, the names of its controllers.
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
    """Yield the process's cgroup in each hierarchy that may limit it, and which mounts are of that hierarchy."""
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
    """Yield where a cgroup and those above it are mounted, up to the topmost that can be seen.

    In a container the mount often begins with the container's own cgroup, and `path` may be told as from outside of
    it: no mount has it then, and the mount's own root is the one.
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
    """Yield the numbers in a file, but for "max" and -1, which mean that there is no limit."""
    for line in _lines(file):
        yield from (int(word) for word in line.split() if word.isdecimal())


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:  # the other version's, or not for us to read
        return []
