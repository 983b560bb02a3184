"""The options of deconvd-server that say who may open its Unix sockets."""

from __future__ import annotations

import grp
import re
from collections.abc import Callable, Collection
from typing import Any, Final, TypeVar

import click

from deconvd_server.command_options import is_account_id
from deconvd_server.resources.socket_file import Access

__all__ = ["add_socket_options", "socket_access"]

_F = TypeVar("_F", bound=Callable[..., Any])

_FILE_MODE: Final = re.compile(r"0?[0-7]{3}")
_GROUP_MODE: Final = 0o660
_WORLD_MODE: Final = 0o666


def _parse_file_mode(
    _context: click.Context, _parameter: click.Parameter, mode: str | None
) -> int | None:
    """Return a file mode of octal digits; None if none is given."""
    if not mode:
        return None
    if not _FILE_MODE.fullmatch(mode):
        raise click.BadParameter(f"{mode!r} is not a file mode in octal digits, as in 0660")
    return int(mode, 8)


def _parse_group_id(
    _context: click.Context, _parameter: click.Parameter, group: str | None
) -> int | None:
    """Return the id of a group that is given by its name or its id; None if none is given."""
    if not group:
        return None
    if is_account_id(group):
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {group!r}") from None


_OPTIONS: Final = (
    click.option(
        "--socket-mode",
        default=None,
        metavar="MODE",
        callback=_parse_file_mode,
        show_default="0660 with --socket-group, 0666 with --shared-memory-users, else what the umask leaves",
        help="Permissions of the Unix sockets, in octal digits: users who may write to a socket may call the server.",
    ),
    click.option(
        "--socket-group",
        default=None,
        metavar="GROUP",
        callback=_parse_group_id,
        show_default="the one that the system gives new files",
        help="The group of the Unix sockets: a name or a number.",
    ),
)


def add_socket_options(command: _F) -> _F:
    """Give a command the options that say who may open its Unix sockets."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def socket_access(mode: int | None, group: int | None, users: Collection[int]) -> Access | None:
    """Return who may open the Unix sockets; None to leave that to the umask."""
    if mode is None:
        if group is None and not users:
            return None
        mode = _WORLD_MODE if group is None else _GROUP_MODE
    return Access(mode, group)
