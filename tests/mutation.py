"""Mutation testing of modules that decide and do no I/O, with cosmic-ray: ``python -m tests.mutation [MODULE]...``.

A mutant is a module with one small change: another operator, number or condition. The module's own tests must fail
for each. One that they pass shows a decision that no test holds, or a change that makes no difference.

The modules, and the test files that must notice, are in pyproject.toml, in the table tool.mutation. cosmic-ray changes
files in place, so it works on copies of the working tree.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__: list[str] = []

_ROOT: Final = Path(__file__).parents[1]
_ROOTS: Final = ("proto", "client", "server")
_COSMIC_RAY: Final = (sys.executable, "-m", "cosmic_ray.cli")
_FILTER: Final = (sys.executable, "-m", "cosmic_ray.tools.filters.operators_filter")

_EXCLUDED: Final = (
    # annotations such as `int | None` are not told from sums of flags
    r"core/ReplaceBinaryOperator_BitOr_.*",
    # one or two replacements for each operator: the other ten say the same
    r"core/ReplaceBinaryOperator_(?!BitOr|Add_Sub$|Sub_Add$|Mul_FloorDiv$|FloorDiv_Mul$|Div_Mul$|Mod_FloorDiv$"
    r"|LShift_RShift$|RShift_LShift$|BitAnd_BitOr$|BitXor_BitOr$|Pow_Mul$)",
    r"core/ReplaceComparisonOperator_(?!Eq_NotEq$|NotEq_Eq$|Lt_LtE$|Lt_GtE$|LtE_Lt$|LtE_Gt$|Gt_GtE$|Gt_LtE$"
    r"|GtE_Gt$|GtE_Lt$|Is_IsNot$|IsNot_Is$)",
    r"core/ReplaceUnaryOperator_(?!Delete_Not$|USub_UAdd$|Delete_USub$)",
)
"""cosmic-ray's operators that are left out."""


@dataclass(frozen=True)
class Room:
    """A module under mutation.

    Attributes:
        module: Its dotted name.
        tests: The test files that must notice its mutants.
        equivalents_count: How many of its mutants make no difference that a test could see.
    """

    module: str
    tests: tuple[str, ...]
    equivalents_count: int

    @property
    def path(self) -> str:
        """Its file, relative to the project's folder."""
        name = self.module.replace(".", "/") + ".py"
        return next(f"{root}/{name}" for root in _ROOTS if (_ROOT / root / name).exists())


@dataclass(frozen=True)
class Outcome:
    """What came of a room's mutants.

    Attributes:
        survivors: The changes that no test noticed, as diffs.
    """

    room: Room
    killed_count: int
    survivors: list[str]
    took_s: float

    @property
    def is_good(self) -> bool:
        """Whether each mutant was noticed that makes a difference."""
        return self.killed_count > 0 and len(self.survivors) <= self.room.equivalents_count

    def __str__(self) -> str:
        total_count = self.killed_count + len(self.survivors)
        return (
            f"{self.room.module}: {self.killed_count}/{total_count} killed, "
            f"{len(self.survivors)} left of {self.room.equivalents_count} that make no difference "
            f"({self.took_s:.0f} s)"
        )


def rooms() -> list[Room]:
    """Return the rooms that pyproject.toml names."""
    table = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["mutation"]
    return [
        Room(module, tuple(entry["tests"]), entry.get("equivalents", 0))
        for module, entry in table.items()
    ]


def mutate(room: Room, folder: Path) -> Outcome:
    """Try all mutants of a room in a copy of the working tree, one after the other."""
    begin_s = time.monotonic()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(folder / root) for root in _ROOTS)
    }
    command, took_s = _command(room, folder, environment)
    # Python takes a compiled file for that of each source of the same size and second
    shutil.rmtree((folder / room.path).parent / "__pycache__", ignore_errors=True)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"

    config, session = folder / "cosmic-ray.toml", folder / f"{room.module}.sqlite"
    config.write_text(_config(room, 5 + 4 * took_s, command))
    for step in (
        [*_COSMIC_RAY, "init", str(config), str(session)],
        [*_FILTER, str(session), str(config)],
        [*_COSMIC_RAY, "exec", str(config), str(session)],
    ):
        subprocess.run(step, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    results = list(_results(session))
    survivors = [result["diff"] for result in results if result["test_outcome"] == "survived"]
    return Outcome(room, len(results) - len(survivors), survivors, time.monotonic() - begin_s)


def _command(room: Room, folder: Path, environment: dict[str, str]) -> tuple[list[str], float]:
    """Return how to run a room's tests, which must pass as it is, and how long they take, in seconds.

    The fixtures that all tests share import client and server, which takes longer than most of these tests.
    """
    common = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    common += ["-p", "no:xdist", "-p", "tests.unshrunk"]
    for options in (["--noconftest"], []):
        command = [*common, *options, *room.tests]
        begin_s = time.monotonic()
        tried = subprocess.run(
            command, cwd=folder, env=environment, check=False, capture_output=True, text=True
        )
        if tried.returncode == 0:
            return command, time.monotonic() - begin_s
    raise RuntimeError(f"the tests of {room.module} fail without any change of it:\n{tried.stdout}")


def _config(room: Room, timeout_s: float, command: list[str]) -> str:
    return f"""
[cosmic-ray]
module-path = {json.dumps(room.path)}
timeout = {timeout_s:.1f}
excluded-modules = []
test-command = {json.dumps(" ".join(command))}
distributor.name = "local"
filters.operators-filter.exclude-operators = {json.dumps(_EXCLUDED)}
"""


def _results(session: Path) -> Iterator[dict[str, Any]]:
    dumped = subprocess.run(
        [*_COSMIC_RAY, "dump", str(session)], check=True, capture_output=True, text=True
    )
    for line in dumped.stdout.splitlines():
        _, result = json.loads(line)
        if result["worker_outcome"] == "skipped":
            continue
        if result["test_outcome"] not in ("killed", "survived"):
            raise RuntimeError(f"a mutant could not be tried: {result['output']}")
        yield result


def _copy_tree(folder: Path) -> None:
    """Copy what git has, or would add, and compile it."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=_ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (_ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_ROOT / name, folder / name)
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", *_ROOTS, "tests"], cwd=folder, check=True
    )


def main(arguments: list[str]) -> int:
    """Try the mutants of all rooms, or of some, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "modules", nargs="*", help="parts of modules' names; all, if there are none"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    chosen = [
        room
        for room in rooms()
        if not options.modules or any(part in room.module for part in options.modules)
    ]
    if not chosen:
        parser.error(f"no module of tool.mutation has any of {options.modules} in its name")

    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(options.jobs) as executor:
        folders: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(min(options.jobs, len(chosen))):
            _copy_tree(folder := Path(directory, str(number)))
            folders.put(folder)

        def run(room: Room) -> Outcome:
            folder = folders.get()
            try:
                return mutate(room, folder)
            finally:
                folders.put(folder)

        outcomes = []
        for outcome in executor.map(run, chosen):
            outcomes.append(outcome)
            print(outcome, flush=True)  # noqa: T201 - a command's output
            if not outcome.is_good:
                print(*outcome.survivors, sep="\n", flush=True)  # noqa: T201
    return 0 if all(outcome.is_good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
