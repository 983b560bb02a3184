"""Runs the examples of a framework as their users do, each in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.environments import ROOT

__all__ = ["decoder_losses", "run_example"]


def run_example(module: str, *arguments: str) -> str:
    """Run an example, which must succeed, and return what it prints."""
    ended = subprocess.run(
        [sys.executable, "-m", f"examples.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def decoder_losses(module: str, target: str, folder: str) -> list[float]:
    """Train 100 steps by one of the programs for the decoder, and return the losses that it prints."""
    arguments = ["--target", target, "--output", folder, "--steps", "100"]
    printed = run_example(module, *arguments)
    losses = [float(loss) for loss in re.findall(r"step +\d+: loss (\d\.\d+)", printed)]
    assert len(losses) == 2, printed
    return losses
