"""What several commands share: options, how errors are reported, and a server that is opened for one command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import click

from deconvd.errors import DeconvdError, InvalidArgumentError
from deconvd_client.connect_options import parse_tenant_key, parse_timeout
from deconvd_client.credential_options import parse_credentials
from deconvd_client.server import Server
from deconvd_client.transports.grpc.channel import MAX_MESSAGE_BYTES
from deconvd_client.transports.route import TransportName
from deconvd_client.transports.targets import parse_target

__all__ = [
    "IntOrPair",
    "open_server",
    "report_errors",
    "target_option",
    "timeout_option",
    "transport_option",
]


_DISCOVERY_S: Final = 2.0
"""How long calls wait for the fastest way to the server: of those that a command makes, the first counts, too."""


_Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

target_option: _Decorator = click.option(
    "--target",
    envvar="DECONVD_TARGET",
    default="127.0.0.1:50051",
    show_default=True,
    help="Address of the server: host:port or unix:path. The environment variable DECONVD_TARGET sets it, too.",
)
timeout_option: _Decorator = click.option(
    "--timeout-s",
    type=float,
    metavar="SECONDS",
    default=60.0,
    show_default=True,
    help="How long a call may take, retries included.",
)
transport_option: _Decorator = click.option(
    "--transport",
    type=click.Choice([name.value for name in TransportName]),
    default=TransportName.AUTO.value,
    show_default=True,
    help="How tensors get to the server. auto takes the fastest transport that works. With another, "
    "the command fails if that transport does not work.",
)


@contextmanager
def report_errors() -> Iterator[None]:
    """End the command with one line, not a traceback, for an error that its user can act on."""
    try:
        yield
    except InvalidArgumentError:
        raise  # `CliCommand` adds the name of the option or environment variable
    except (DeconvdError, OSError) as error:
        raise click.ClickException(str(error)) from None


class IntOrPair(click.ParamType):  # type: ignore[type-arg]  # older clicks have no types in it
    """``2`` for both axes, or ``2,3`` for height and width."""

    name = "INT|H,W"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | tuple[int, ...]:
        """Return an int, or a tuple whose length `Geometry` checks."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # the default
        try:
            parts = tuple(map(int, value.split(",")))
        except ValueError:
            self.fail(f"must be one integer, or two as in 2,3, got {value!r}", param, ctx)
        return parts[0] if len(parts) == 1 else parts


def open_server(target: str, transport: TransportName, timeout_s: float) -> Server:
    """Return a server, to which nothing is sent yet. Raises InvalidArgumentError if an argument is wrong."""
    target = parse_target(target)
    return Server(
        target,
        transport=transport,
        max_message_bytes=MAX_MESSAGE_BYTES,
        tenant_key=parse_tenant_key(None),
        credentials=parse_credentials(target, None, None),
        timeout_s=parse_timeout(timeout_s),
        fail_fast=True,
        discovery_s=_DISCOVERY_S,
    )
