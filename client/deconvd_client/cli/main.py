"""The group of the commands of `deconvd`. Its help and version import neither gRPC nor numpy."""

from __future__ import annotations

import click

import deconvd
from deconvd_client.cli.lazy_group import LazyCommand, LazyGroup

__all__ = ["main"]

_COMMANDS = {
    "bench": LazyCommand(
        "bench", "Measure a server and the network to it, and show where the time of a call goes."
    ),
    "run": LazyCommand("run", "Deconvolve X by W, two files, and write the result to a file."),
    "status": LazyCommand(
        "status", "Show whether a server serves, and its version, devices and caches."
    ),
    "top": LazyCommand(
        "top",
        "Show what a server does: calls, failures, bytes, times, caches, memory and devices, each second.",
    ),
}
"""The commands: their modules in this package, each with a command of the same name, and their lines in the help."""


@click.group(cls=LazyGroup, package="deconvd_client.cli", lazy_commands=_COMMANDS)
@click.version_option(deconvd.__version__, prog_name="deconvd")
def main() -> None:
    """Run Chainer's deconvolution_2d on a deconvd server."""
