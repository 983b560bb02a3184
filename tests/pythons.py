"""Find a Python of some version: ``python -m tests.pythons 3.12`` prints the path of its interpreter.

It is looked for on PATH, where pyenv keeps its versions, and then with uv, which downloads it if it can.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["find_python"]

_ASK = "import sys, venv; print('%d.%d' % sys.version_info[:2])"


def find_python(version: str) -> Path | None:
    """Return an interpreter of a version such as "3.12" that can make environments; None if there is none."""
    return next(
        (path for path in _candidates(version) if _said_by(path, "-c", _ASK) == version), None
    )


def _candidates(version: str) -> Iterator[Path]:
    for name in (f"python{version}", "python3"):
        for folder in os.get_exec_path():
            yield Path(folder, name)
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from sorted(pyenv.glob(f"versions/{version}.*/bin/python"))
    if (uv := shutil.which("uv")) is not None:
        _said_by(Path(uv), "python", "install", version)
        yield Path(_said_by(Path(uv), "python", "find", version))


def _said_by(program: Path, *arguments: str) -> str:
    """Return what a program prints; nothing if it fails or is not there."""
    try:
        ended = subprocess.run(
            [program, *arguments], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return ended.stdout.decode().strip()


def main(version: str) -> int:
    """Print the path, or what to install, and return the exit code."""
    if (python := find_python(version)) is not None:
        print(python)  # noqa: T201 - a command's output
        return 0
    sys.stderr.write(
        f"There is no Python {version} that can make environments: not on PATH, not in pyenv, not from uv.\n"
        f"Install python{version} and python{version}-venv from your system's packages, or get it by\n"
        f"`uv python install {version}` or `pyenv install {version}`.\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
