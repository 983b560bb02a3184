"""The options of deconvd-server that say when it stops, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from deconvd_server.command_options import Seconds

__all__ = ["add_stop_options"]

_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS: Final = (
    click.option(
        "--drain-timeout-s",
        type=Seconds(min=0),
        metavar="SECONDS",
        default=30.0,
        help="How long calls under way may take to end after SIGTERM or SIGINT. The process ends at most two seconds "
        "later, and at once at a second signal. --drain-delay-s comes before it.",
    ),
    click.option(
        "--drain-delay-s",
        type=Seconds(min=0),
        metavar="SECONDS",
        default=0.0,
        help="How long to serve new calls after SIGTERM or SIGINT, before --drain-timeout-s begins, while health says "
        "NOT_SERVING: a balancer that asks for health then sends calls elsewhere before they are refused.",
    ),
    click.option(
        "--device-timeout-s",
        type=Seconds(min=0, min_open=True),
        metavar="SECONDS",
        default=120.0,
        help="How long a GPU may take for the kernels and copies of a call. After that it hangs: the server answers "
        "all calls with UNAVAILABLE, and exits with code 5 to be restarted.",
    ),
)


def add_stop_options(command: _F) -> _F:
    """Give a command the options that say when the server stops, and how."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
