"""The command `deconvd`, as a process."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["COMMAND", "deconvd", "deconvd_bytes", "environment_without", "read_terminal"]

COMMAND = [sys.executable, "-W", "error", "-m", "deconvd_client.cli"]


def deconvd(
    *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command. It must end by itself."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=os.environ | dict(environment or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def deconvd_bytes(*arguments: str, cwd: Path, stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    """Run the command with bytes as its standard input and output."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )


def environment_without(package: str, folder: Path) -> dict[str, str]:
    """Return an environment in which a package cannot be imported; a folder is made for it."""
    folder.mkdir()
    (folder / f"{package}.py").write_text(
        f"raise ModuleNotFoundError('no {package}', name={package!r})"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def read_terminal(terminal: int, pattern: str) -> str:
    """Return what a terminal shows, without colors, until a pattern has come."""
    shown = ""
    while not re.search(pattern, shown):
        readable, _, _ = select.select([terminal], [], [], 30)
        assert readable, shown
        shown += re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", os.read(terminal, 1 << 16).decode())
    return shown
