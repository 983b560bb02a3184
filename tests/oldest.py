"""Pins for the oldest packages that pyproject.toml allows: ``python -m tests.oldest > constraints``.

What deconvd and its server need is pinned to its lower bound, and what tests need as in constraints.txt.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

_ROOT = Path(__file__).parents[1]
_BOUND = re.compile(r"^([\w-]+)>=([\w.]+)", re.MULTILINE)
_PIN = re.compile(r"^([\w-]+)==([\w.]+)", re.MULTILINE)


def oldest_pins() -> list[str]:
    """Return the pins, one a line, as pip takes them for constraints."""
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    needed = "\n".join(project["dependencies"] + project["optional-dependencies"]["server"])
    bounds = dict(_BOUND.findall(needed))
    pins = _PIN.findall((_ROOT / "constraints.txt").read_text())
    return [f"{name}=={version}" for name, version in (dict(pins) | bounds).items()]


if __name__ == "__main__":
    sys.stdout.write("\n".join(oldest_pins()) + "\n")
