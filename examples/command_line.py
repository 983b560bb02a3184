"""The command line of the examples: common options, and errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from deconvd_client import Connection, DeconvdError, connect

__all__ = ["open_connection", "output_option", "report_errors", "target_option"]

target_option = click.option(
    "--target",
    envvar="DECONVD_TARGET",
    default="127.0.0.1:50051",
    show_default=True,
    help="The server: host:port or unix:path. Environment variable: DECONVD_TARGET.",
)
output_option = click.option(
    "--output",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-output"),
    show_default=True,
    help="Folder for the pictures. It is created if necessary.",
)


@contextmanager
def open_connection(target: str) -> Iterator[Connection]:
    """Yield a connection, after printing the devices of its server."""
    with connect(target) as F:
        devices = ", ".join(f"{device.id}: {device.name}" for device in F.server_info().devices)
        click.echo(f"Connected to {target} ({devices})")
        yield F


@contextmanager
def report_errors() -> Iterator[None]:
    """End the program with a one-line message if the block raises an error that the user can correct."""
    try:
        yield
    except (DeconvdError, OSError) as error:
        raise click.ClickException(str(error)) from None
