"""Mutation testing of modules that decide and do no I/O, with cosmic-ray: ``python -m tests.mutation [MODULE]...``.

A mutant is a module with one small change: another operator, number or condition. The module's own tests must fail
for each. One that they pass shows a decision that no test holds, or a change that makes no difference.

The modules, and the test files that must notice, are in pyproject.toml, in the table tool.mutation. No file is changed:
each mutant is tried in a child of this process, which imports the changed module in place of the real one. Thus a
process that a test starts has the real one. A child is forked once the packages that tests use are imported, which
takes longer than most of these tests.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import os
import re
import signal
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import CodeType, ModuleType
from typing import Final

import pytest
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

__all__: list[str] = []

_ROOT: Final = Path(__file__).parents[1]
_ROOTS: Final = ("proto", "client", "server")
_OURS: Final = ("deconvd", "deconvd_client", "deconvd_server", "tests", "__main__")
_PYTEST: Final = (
    *("-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"),
    *("-p", "tests.unshrunk"),
)
_FORK: Final = get_context("fork")

_EXCLUDED: Final = re.compile(
    # annotations such as `int | None` are not told from sums of flags
    r"core/ReplaceBinaryOperator_BitOr_.*"
    # one or two replacements for each operator: the other ten say the same
    r"|core/ReplaceBinaryOperator_(?!BitOr|Add_Sub$|Sub_Add$|Mul_FloorDiv$|FloorDiv_Mul$|Div_Mul$|Mod_FloorDiv$"
    r"|LShift_RShift$|RShift_LShift$|BitAnd_BitOr$|BitXor_BitOr$|Pow_Mul$)"
    r"|core/ReplaceComparisonOperator_(?!Eq_NotEq$|NotEq_Eq$|Lt_LtE$|Lt_GtE$|LtE_Lt$|LtE_Gt$|Gt_GtE$|Gt_LtE$"
    r"|GtE_Gt$|GtE_Lt$|Is_IsNot$|IsNot_Is$)"
    r"|core/ReplaceUnaryOperator_(?!Delete_Not$|USub_UAdd$|Delete_USub$)"
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

    def mutants(self) -> Iterator[str]:
        """Yield its source with each small change in turn."""
        source = (_ROOT / self.path).read_text()
        for name in operator_names():
            operator = get_operator(name)
            if _EXCLUDED.match(name) or operator.arguments():
                continue
            for occurrence in itertools.count():
                mutant = mutate_code(source, operator(), occurrence)
                if mutant is None:
                    break
                yield mutant

    def difference(self, mutant: str) -> str:
        """Return what a mutant changes, as a diff."""
        source = (_ROOT / self.path).read_text()
        lines = difflib.unified_diff(
            source.splitlines(), mutant.splitlines(), self.path, lineterm=""
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Verdict:
    """What came of a mutant.

    Attributes:
        change: What it changes, as a diff.
        is_killed: Whether a test noticed.
        ending: What pytest wrote last.
    """

    change: str
    is_killed: bool
    ending: str

    def __str__(self) -> str:
        return f"{'killed' if self.is_killed else 'SURVIVED'}: {self.ending}\n{self.change}"


class _Trial:
    """A run of a room's tests with a mutant, or with the room as it is, in a child."""

    def __init__(self, room: Room, mutant: str | None, options: Sequence[str]) -> None:
        self.mutant = mutant
        self.begin_s = time.monotonic()
        self._written = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed at the end
        self._imported, imported = _FORK.Pipe(duplex=False)
        arguments = [*_PYTEST, *options, *room.tests]
        self._process = _FORK.Process(target=self._run, args=(room, arguments, imported))
        self._process.start()
        imported.close()

    @property
    def sentinel(self) -> int:
        """Ready once the tests have ended."""
        return self._process.sentinel

    def imported(self) -> list[str]:
        """Return what the tests have imported, once they have ended."""
        names: list[str] = self._imported.recv()
        return names

    def end(self) -> tuple[bool, str]:
        """End it, with all that it has started; return whether its tests passed, and what they wrote."""
        pid = self._process.pid
        assert pid is not None
        for kill in (os.kill, os.killpg):
            with suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
        self._process.join()
        self._imported.close()
        with self._written as written:
            written.seek(0)
            return self._process.exitcode == 0, written.read()

    def _run(self, room: Room, arguments: list[str], imported: Connection) -> None:
        os.setsid()
        for stream in (sys.stdout, sys.stderr):
            os.dup2(self._written.fileno(), stream.fileno())
        if self.mutant is not None:
            sys.meta_path.insert(0, _MutantFinder(room.module, self.mutant))
        status = pytest.main(arguments)
        if self.mutant is None:
            imported.send(list(sys.modules))
        sys.exit(int(status))


class _MutantFinder(MetaPathFinder):
    """Finds a mutant in place of its module."""

    def __init__(self, module: str, mutant: str) -> None:
        self._module = module
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = _MutantLoader(fullname, spec.origin, self._mutant)
        return spec


class _MutantLoader(SourceFileLoader):
    def __init__(self, fullname: str, path: str, mutant: str) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._mutant, self.path, "exec", dont_inherit=True)


def rooms() -> list[Room]:
    """Return the rooms that pyproject.toml names."""
    table = tomllib.loads((_ROOT / "pyproject.toml").read_text())["tool"]["mutation"]
    return [
        Room(module, tuple(entry["tests"]), entry.get("equivalents", 0))
        for module, entry in table.items()
    ]


def mutate(room: Room, jobs_count: int) -> Iterator[Verdict]:
    """Try all mutants of a room, some at once, and yield what comes of each, in the order of their ends."""
    options, limit_s = _prepare(room)
    mutants = room.mutants()
    running = dict[int, _Trial]()
    try:
        while True:
            for mutant in itertools.islice(mutants, jobs_count - len(running)):
                trial = _Trial(room, mutant, options)
                running[trial.sentinel] = trial
            if not running:
                return
            until_s = min(trial.begin_s for trial in running.values()) + limit_s
            ended = wait([*running], max(until_s - time.monotonic(), 0))
            for sentinel, trial in [*running.items()]:
                is_late = time.monotonic() >= trial.begin_s + limit_s
                if sentinel in ended or is_late:
                    del running[sentinel]
                    assert trial.mutant is not None
                    passed, written = trial.end()
                    last = "\n".join(written.splitlines()[-3:])
                    ending = last if sentinel in ended else "it took too long"
                    yield Verdict(room.difference(trial.mutant), not passed, ending)
    finally:
        for trial in running.values():
            trial.end()


def _prepare(room: Room) -> tuple[list[str], float]:
    """Return how to run a room's tests, which must pass as it is, and how long they may take with a mutant, in seconds.

    What they import of packages is imported here, for all that follow. The fixtures that all tests share import client
    and server, which takes longer than most of these tests.
    """
    for options in (["--noconftest"], []):
        trial = _Trial(room, None, options)
        names = trial.imported()
        wait([trial.sentinel])
        took_s = time.monotonic() - trial.begin_s
        passed, written = trial.end()
        if passed:
            for name in names:
                if name.partition(".")[0] not in _OURS:
                    with suppress(ImportError):  # some are made by others, and have no file
                        importlib.import_module(name)
            return options, 5 + 4 * took_s
    raise RuntimeError(f"the tests of {room.module} fail without any change of it:\n{written}")


def main(arguments: list[str]) -> int:
    """Try the mutants of all rooms, or of some, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "modules", nargs="*", help="parts of modules' names; all, if there are none"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=2 * (os.cpu_count() or 1),
        help="how many are tried at once; two for each core, as many hang until their time is over",
    )
    parser.add_argument("--verbose", action="store_true", help="show what comes of each mutant")
    options = parser.parse_args(arguments)
    chosen = [
        room
        for room in rooms()
        if not options.modules or any(part in room.module for part in options.modules)
    ]
    if not chosen:
        parser.error(f"no module of tool.mutation has any of {options.modules} in its name")

    results = [_is_good(room, options.jobs, options.verbose) for room in chosen]
    return 0 if all(results) else 1


def _is_good(room: Room, jobs_count: int, is_verbose: bool) -> bool:
    """Try a room, show what came of it, and return whether each mutant was noticed that makes a difference."""
    begin_s = time.monotonic()
    verdicts = list[Verdict]()
    for verdict in mutate(room, jobs_count):
        verdicts.append(verdict)
        if is_verbose:
            print(verdict, flush=True)  # noqa: T201 - a command's output
    survivors = [verdict for verdict in verdicts if not verdict.is_killed]
    killed_count = len(verdicts) - len(survivors)
    is_good = killed_count > 0 and len(survivors) <= room.equivalents_count
    summary = (
        f"{room.module}: {killed_count}/{len(verdicts)} killed, {len(survivors)} left of "
        f"{room.equivalents_count} that make no difference ({time.monotonic() - begin_s:.0f} s)"
    )
    print(summary, *([] if is_good else survivors), sep="\n", flush=True)  # noqa: T201 - a command's output
    return is_good


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
