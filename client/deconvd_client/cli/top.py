"""The command `deconvd top`: shows what a server does, again and again."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Final

import click
from click.core import ParameterSource

from deconvd.command_line import CliCommand, WholeNumber
from deconvd.errors import DeconvdError
from deconvd_client.calls.uninterrupted import call_uninterrupted
from deconvd_client.cli.interrupts import exit_on_signals
from deconvd_client.cli.load_lines import Reading, json_line, text_line
from deconvd_client.cli.load_rates import Sample, rates_between
from deconvd_client.cli.options import report_errors, target_option
from deconvd_client.connection import Connection
from deconvd_client.connector import connect
from deconvd_client.transports.targets import parse_target

__all__ = ["top"]

_LEAST_INTERVAL_S: Final = 0.1

_TIMEOUT_S: Final = 5.0
"""How long the server may take to answer until it is shown as away."""


@click.command(cls=CliCommand)
@click.argument("address", metavar="[TARGET]", required=False)
@click.option(
    "--interval-s",
    type=float,
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="How often to ask the server.",
)
@click.option(
    "--count",
    type=WholeNumber(min=1),
    metavar="N",
    help="End after that many intervals. Without it: after Ctrl-C.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line, for programs.")
@target_option
def top(
    address: str | None, interval_s: float, count: int | None, as_json: bool, target: str
) -> None:
    """Show what a server does: calls, failures, bytes, times, caches, memory and devices, each second.

    TARGET is the same as --target. On a terminal this takes the whole screen, and needs: pip install 'deconvd[cli]'.
    Elsewhere it prints one line for each interval.

    A server that knows you by a token or a certificate shows your own calls alone, and otherwise those of all clients.
    Rates are those of the last interval. The sum over all calls leaves out GetServerInfo, which this command itself
    calls. A server that does not answer is shown as away, and asked again. Of the tensors that the server keeps, none
    are shown: they are their owners' business.

    Exit codes: 0 after --count intervals; 1 if the server has not answered in any of them; 2 if an option is wrong; 130
    after Ctrl-C.
    """
    if not (interval_s >= _LEAST_INTERVAL_S and math.isfinite(interval_s)):
        raise click.BadParameter(
            f"must be at least {_LEAST_INTERVAL_S}, got {interval_s}", param_hint="--interval-s"
        )
    source = click.get_current_context().get_parameter_source("target")
    if address is not None and source is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"TARGET and --target name two servers, {address} and {target}")
    with (
        report_errors(),
        exit_on_signals(),
        connect(
            parse_target(address or target), transport="grpc", timeout_s=_TIMEOUT_S, fail_fast=True
        ) as F,
        _open_view(as_json=as_json) as show,
    ):
        has_answered = False
        for reading in _readings(F, interval_s, math.inf if count is None else count):
            has_answered |= reading.error is None
            show(reading)
    if not has_answered:
        raise SystemExit(1)


@contextmanager
def _open_view(*, as_json: bool) -> Iterator[Callable[[Reading], None]]:
    """Give a function that shows a reading, as standard output can."""
    if as_json:
        yield lambda reading: click.echo(json_line(reading))
    elif not sys.stdout.isatty():
        yield lambda reading: click.echo(text_line(reading))
    else:
        try:
            from deconvd_client.cli.load_table import LiveTable
        except ImportError:
            raise click.ClickException(
                "deconvd top needs the package rich on a terminal: pip install 'deconvd[cli]', or print lines with "
                "--json"
            ) from None
        with LiveTable() as table:
            yield table.show


def _readings(F: Connection, interval_s: float, count: float) -> Iterator[Reading]:
    """Yield what the server did in each interval."""
    latest: Sample | None = None
    intervals_count = -1  # the first answer only begins the first interval
    next_s = time.monotonic()
    while intervals_count < count:
        before, error = latest, None
        try:
            info = call_uninterrupted(F.server_info)
        except DeconvdError as caught:
            error = str(caught)
        else:
            latest = Sample(info, time.monotonic())
        intervals_count += 1
        if intervals_count:
            rates = None if error is not None or latest is None else rates_between(before, latest)
            yield Reading(F.target, datetime.now(UTC).astimezone(), rates, error)
        if intervals_count < count:
            next_s = max(next_s + interval_s, time.monotonic())
            time.sleep(max(next_s - time.monotonic(), 0))
