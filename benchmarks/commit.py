"""Which commit is measured."""

from __future__ import annotations

import os
import subprocess

__all__ = ["commit"]


def commit() -> str:
    """Return the commit's hash, with ``-dirty`` behind it where files have changed since.

    Where the tree is no checkout of it, DECONVD_COMMIT in the environment says it.
    """
    told = os.environ.get("DECONVD_COMMIT")
    if told:
        return told
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
