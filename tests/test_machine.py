"""What the machine leaves to a process: in real cgroups of version 1, and by folders as those of version 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deconvd.host import machine
from tests.cgroups import cgroup

HOST_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
AFFINITY_COUNT = len(os.sched_getaffinity(0))
PRINT = "from deconvd.host.machine import *; print(memory_bytes(), processors_count())"


def version_2(root: str = "/", point: str = "/cgroups") -> str:
    return f"30 23 0:26 {root} {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"


def version_1(controllers: str, root: str = "/", point: str = "/cgroups") -> str:
    return f"35 31 0:32 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,{controllers}"


def make(root: Path, membership: str, mount: str, files: dict[str, str]) -> Path:
    """Make a root directory of a process in a cgroup. `files` are beneath it."""
    ordinary = "23 1 8:1 / / rw,relatime - ext4 /dev/root rw"
    process = {
        "proc/self/cgroup": f"5:devices:/elsewhere\n{membership}\n",
        "proc/self/mountinfo": f"{ordinary}\n{mount}\n",
    }
    for name, text in {**process, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected_bytes"),
    [
        ({"cgroups/a/b/memory.max": "600000000\n"}, 600_000_000),
        ({"cgroups/a/b/memory.max": "max\n"}, HOST_BYTES),
        ({"cgroups/a/b/memory.max": f"{HOST_BYTES * 2}\n"}, HOST_BYTES),
        ({"cgroups/a/memory.max": "500000000\n", "cgroups/a/b/memory.max": "max\n"}, 500_000_000),
        ({"cgroups/memory.max": "400000000\n", "cgroups/a/memory.max": "500000000\n"}, 400_000_000),
        ({"cgroups/a/sibling/memory.max": "1000\n"}, HOST_BYTES),
        ({}, HOST_BYTES),
    ],
)
def test_memory_is_the_least_of_the_host_and_the_cgroups_of_version_2(
    tmp_path: Path, files: dict[str, str], expected_bytes: int
) -> None:
    root = make(tmp_path, "0::/a/b", version_2(), files)

    assert machine.memory_bytes(root) == expected_bytes


@pytest.mark.parametrize(
    ("text", "expected_count"),
    [
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        (f"{AFFINITY_COUNT * 200000} 100000\n", AFFINITY_COUNT),
        ("max 100000\n", AFFINITY_COUNT),
        ("1000 100000\n", 1),
    ],
)
def test_processors_are_those_of_the_affinity_or_the_quota_of_version_2(
    tmp_path: Path, text: str, expected_count: int
) -> None:
    root = make(tmp_path, "0::/a/b", version_2(), {"cgroups/a/cpu.max": text})

    assert machine.processors_count(root) == expected_count


@pytest.mark.skipif(AFFINITY_COUNT < 2, reason="one processor cannot be shared")
def test_a_part_of_a_processor_counts_as_one(tmp_path: Path) -> None:
    root = make(tmp_path, "0::/", version_2(), {"cgroups/cpu.max": "150000 100000"})

    assert machine.processors_count(root) == 2


@pytest.mark.parametrize(
    ("membership", "mount", "files"),
    [
        # a namespace of its own: the mount begins with the container's cgroup, which is "/" for those within
        ("0::/", version_2(), {"cgroups/memory.max": "1000"}),
        # none: the process is told where it is on the host, and sees only the container's
        (
            "0::/docker/abc/sub",
            version_2(root="/docker/abc"),
            {"cgroups/memory.max": "1000", "cgroups/sub/memory.max": "2000"},
        ),
        # the namespace was made elsewhere
        ("0::/../abc", version_2(), {"cgroups/memory.max": "1000"}),
        # version 1, with a limit of a pod that is not mounted
        (
            "4:memory:/kubepods/pod/abc",
            version_1("memory", root="/kubepods/pod/abc"),
            {
                "cgroups/memory.limit_in_bytes": "9223372036854771712",
                "cgroups/memory.stat": "cache 0\nhierarchical_memory_limit 1000\nrss 0",
            },
        ),
        # a mount with a space in its name
        ("0::/", version_2(point="/my\\040cgroups"), {"my cgroups/memory.max": "1000"}),
    ],
)
def test_limits_are_found_within_a_container(
    tmp_path: Path, membership: str, mount: str, files: dict[str, str]
) -> None:
    assert machine.memory_bytes(make(tmp_path, membership, mount, files)) == 1000


def test_version_1_has_controllers_together_and_limits_above(tmp_path: Path) -> None:
    files = {
        "cgroups/a/memory.limit_in_bytes": "1000",
        "cgroups/a/b/cpu.cfs_quota_us": "-1",
        "cgroups/a/b/cpu.cfs_period_us": "100000",
        "cgroups/a/cpu.cfs_quota_us": "100000",
        "cgroups/a/cpu.cfs_period_us": "100000",
    }
    root = make(tmp_path, "4:cpu,memory:/a/b", version_1("cpu,memory"), files)

    assert machine.memory_bytes(root) == 1000
    assert machine.processors_count(root) == 1


@pytest.mark.parametrize("text", ["", "\n", "none of it\n", "max", "1.5"])
def test_what_cannot_be_read_is_no_limit(tmp_path: Path, text: str) -> None:
    files = {"cgroups/memory.max": text, "cgroups/cpu.max": text}
    root = make(tmp_path, "0::/", version_2(), files)

    assert machine.memory_bytes(root) == HOST_BYTES
    assert machine.processors_count(root) == AFFINITY_COUNT


def test_without_proc_the_machine_is_the_host(tmp_path: Path) -> None:
    assert machine.memory_bytes(tmp_path) == HOST_BYTES
    assert machine.processors_count(tmp_path) == AFFINITY_COUNT


def test_a_real_cgroup_bounds_memory_and_processors() -> None:
    with cgroup(memory_bytes=600 << 20, processors_count=0.5) as group:
        command = group.command([sys.executable, "-c", PRINT])
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert printed.split() == [str(600 << 20), "1"]
