"""Real cgroups of version 1, to run servers in whose memory, tasks or processors are few. Only root can have them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import wait_until

__all__ = ["Cgroup", "cgroup"]

_MOUNTS = Path("/sys/fs/cgroup")
_PERIOD_US = 100_000


@dataclass(frozen=True)
class Cgroup:
    """A cgroup for each of some controllers.

    Attributes:
        folders: Where they are, by controller: "memory", "pids", "cpu".
    """

    folders: dict[str, Path]

    def add(self, pid: int) -> None:
        """Put a process into them, with all its threads. What memory it has stays where it was counted."""
        for folder in self.folders.values():
            (folder / "cgroup.procs").write_text(str(pid))

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command that runs another one within, from its first moment, under the same process id."""
        files = [str(folder / "cgroup.procs") for folder in self.folders.values()]
        enter = " && ".join(f"echo $$ > '{file}'" for file in files)
        return ["sh", "-c", f'{enter} && exec "$@"', "sh", *words]

    @property
    def memory_bytes(self) -> int:
        """What is charged to it now: pages of files that the kernel may drop at any time, too."""
        return self._read_number("memory.usage_in_bytes")

    @property
    def kept_memory_bytes(self) -> int:
        """What is charged to it now that cannot be dropped: anonymous memory and shared memory."""
        stat = dict(line.split() for line in self._read_text("memory.stat").splitlines())
        return int(stat["rss"]) + int(stat["shmem"])

    @property
    def peak_memory_bytes(self) -> int:
        """The most that was ever charged to it."""
        return self._read_number("memory.max_usage_in_bytes")

    @property
    def kills_count(self) -> int:
        """How many processes the kernel has ended there, for want of memory."""
        control = dict(line.split() for line in self._read_text("memory.oom_control").splitlines())
        return int(control["oom_kill"])

    def _read_number(self, name: str) -> int:
        return int(self._read_text(name))

    def _read_text(self, name: str) -> str:
        return (self.folders["memory"] / name).read_text()


@contextmanager
def cgroup(
    *,
    memory_bytes: int | None = None,
    tasks_count: int | None = None,
    processors_count: float | None = None,
) -> Iterator[Cgroup]:
    """Make a cgroup with limits for the block; what still runs there at the end must end by itself.

    Skips the test where the system lets us have none.

    Args:
        memory_bytes: The most that its processes may fill; there is no swap beside it.
        tasks_count: The most threads.
        processors_count: How many processors they may keep busy, as 1.5.
    """
    limits: dict[str, dict[str, int]] = {}
    if memory_bytes is not None:
        limits["memory"] = {"memory.limit_in_bytes": memory_bytes}
    if tasks_count is not None:
        limits["pids"] = {"pids.max": tasks_count}
    if processors_count is not None:
        quota_us = round(processors_count * _PERIOD_US)
        limits["cpu"] = {"cpu.cfs_period_us": _PERIOD_US, "cpu.cfs_quota_us": quota_us}
    with ExitStack() as stack:
        yield Cgroup(
            {name: stack.enter_context(_make_cgroup(name, limits[name])) for name in limits}
        )


@contextmanager
def _make_cgroup(controller: str, limits: dict[str, int]) -> Iterator[Path]:
    folder = _make_directory(controller)
    try:
        for name, value in limits.items():
            (folder / name).write_text(str(value))
        yield folder
    finally:
        wait_until(lambda: not (folder / "cgroup.procs").read_text())
        folder.rmdir()


def _make_directory(controller: str) -> Path:
    mount = _MOUNTS / controller
    if not (mount / "cgroup.clone_children").exists():
        pytest.skip(f"no cgroups of version 1 for {controller} are mounted at {mount}")
    try:
        return Path(tempfile.mkdtemp(prefix="deconvd-test-", dir=mount))
    except OSError as error:
        pytest.skip(f"no cgroup can be made in {mount}: {error.strerror}")
