"""Python environments of their own, for tests of what users install."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Environment", "fresh_environment"]

ROOT = Path(__file__).parents[1]
_TIMEOUT_S = 500
_CLEARED_PREFIXES = ("PYTHON", "VIRTUAL_ENV", "DECONVD_")


@dataclass(frozen=True)
class Environment:
    """A virtual environment, used as after its activation, and far from this project's files.

    Attributes:
        folder: Where it lies.
        directory: Where its commands are run, an empty folder at first.
        variables: What its commands find in the environment.
    """

    folder: Path
    directory: Path
    variables: dict[str, str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command and return how it ended."""
        return subprocess.run(
            command,
            cwd=self.directory,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )

    def output(self, *command: str) -> str:
        """Run a command that must succeed and return what it prints."""
        ended = self.run(*command)
        assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
        return ended.stdout

    def install(self, *packages: str) -> None:
        """Install packages with pip."""
        self.output("python", "-m", "pip", "install", "--quiet", *packages)


def fresh_environment(directory: Path, *, pinned: bool = True) -> Environment:
    """Make an environment that holds pip alone.

    Args:
        directory: An empty folder to make it in.
        pinned: Whether its packages are those of constraints.txt, and not the newest.
    """
    folder, work = directory / "environment", directory / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(_CLEARED_PREFIXES)
    }
    variables["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    if pinned:
        variables["PIP_CONSTRAINT"] = str(ROOT / "constraints.txt")
    return Environment(folder, work, variables)
