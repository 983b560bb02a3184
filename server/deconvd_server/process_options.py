"""The options of deconvd-server that say in how many processes it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from deconvd.command_line import WholeNumber

__all__ = ["add_process_options"]

_F = TypeVar("_F", bound=Callable[..., Any])

_MOST_COUNT: Final = 64

_OPTIONS: Final = (
    click.option(
        "--processes",
        type=WholeNumber(0, _MOST_COUNT),
        metavar="N",
        default=None,
        show_default="one for each GPU if there are several, and else one alone",
        help="In how many processes to serve: for each GPU, or in all on the processor. A further process starts them, "
        "and starts again those that end. They share the memory and the processors. 0: one for all devices together, "
        "as is the default with --parent, and with a --direct-port without --worker-port.",
    ),
    click.option(
        "--worker-port",
        type=WholeNumber(0, 65535),
        metavar="PORT",
        default=0,
        show_default="any free ports",
        help="With several processes, each also has TCP ports of its own: from this one on for calls, and from "
        "--direct-port on for direct calls.",
    ),
)


def add_process_options(command: _F) -> _F:
    """Give a command the options that say in how many processes the server serves."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
