"""The options of deconvd-server that say how much memory clients may take, and for how long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from deconvd_server.command_options import LAST_ACCOUNT_ID, ByteSize, Seconds, is_account_id
from deconvd_server.resources.budgets import LEAST_MESSAGE_BYTES

__all__ = ["add_memory_options"]

_F = TypeVar("_F", bound=Callable[..., Any])

_GRPC_MAX_MESSAGE_BYTES: Final = 2**31 - 1
"""gRPC holds the limit in a signed 32-bit integer."""


def _parse_user_ids(
    _context: click.Context, _parameter: click.Parameter, ids: str | None
) -> tuple[int, ...]:
    """Return the user ids in a list as in ``1000,1001``."""
    given = [] if not ids else ids.split(",")
    if not all(map(is_account_id, given)):
        raise click.BadParameter(
            f"{ids!r} is not a list of user ids up to {LAST_ACCOUNT_ID}, as in 1000,1001"
        )
    return tuple(map(int, given))


_OPTIONS: Final = (
    click.option(
        "--max-message-bytes",
        type=ByteSize(LEAST_MESSAGE_BYTES, _GRPC_MAX_MESSAGE_BYTES),
        default=None,
        show_default="1 GiB, or an eighth of the memory if that is less",
        help="The largest request and the largest response.",
    ),
    click.option(
        "--shared-memory-bytes",
        type=ByteSize(min=0),
        default=None,
        show_default="a quarter of the memory",
        help="How much memory all clients on this host together may borrow to pass tensors in; 0 to lend none.",
    ),
    click.option(
        "--shared-memory-users",
        default=None,
        metavar="ID[,...]",
        callback=_parse_user_ids,
        show_default="none",
        help="Ids of the users who may borrow that memory, in addition to the server's own user and root. Any user may "
        "then call, unless --socket-mode or --socket-group restricts that.",
    ),
    click.option(
        "--resident-memory-bytes",
        type=ByteSize(min=0),
        default=None,
        show_default="a quarter of what calls may take",
        help="How much of each device's memory resident tensors may take; 0 to keep none.",
    ),
    click.option(
        "--spill-memory-bytes",
        type=ByteSize(min=0),
        default=None,
        show_default="an eighth of the memory",
        help="How much of the host's memory resident tensors may take when a GPU has no room for them.",
    ),
    click.option(
        "--tenant-bytes",
        type=ByteSize(min=0),
        default=None,
        show_default="no quota: the least recently used are evicted",
        help="How much memory the residents of one identity may take: the name of a token or a certificate. Of callers "
        "without one, those that send the same tenant key count together, and else each connection. It is for all "
        "processes of the server together; a connection that is counted alone may have as much in each.",
    ),
    click.option(
        "--session-lease-s",
        type=Seconds(min=0, min_open=True),
        metavar="SECONDS",
        default=30.0,
        help="How long residents are kept for a client that sends no heartbeat.",
    ),
)


def add_memory_options(command: _F) -> _F:
    """Give a command the options that say how much memory clients may take."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
