"""The options of deconvd-server that say who may open its Unix sockets."""

from __future__ import annotations

import grp
import re
from collections.abc import Collection
from typing import Final

import click

from deconvd_server.resources.socket_file import Access

__all__ = ["parse_file_mode", "parse_group_id", "parse_user_ids", "socket_access"]

_USER_ID: Final = re.compile(r"[0-9]{1,10}")
_LAST_ID: Final = 2**32 - 2
"""The largest user or group id: the system uses the next one, -1, for "no change"."""

_FILE_MODE: Final = re.compile(r"0?[0-7]{3}")
_GROUP_MODE: Final = 0o660
_WORLD_MODE: Final = 0o666


def parse_user_ids(
    _context: click.Context, _parameter: click.Parameter, ids: str | None
) -> tuple[int, ...]:
    """Return the user ids in a list as in ``1000,1001``."""
    given = [] if not ids else ids.split(",")
    if not all(_USER_ID.fullmatch(one) and int(one) <= _LAST_ID for one in given):
        raise click.BadParameter(
            f"{ids!r} is not a list of user ids up to {_LAST_ID}, as in 1000,1001"
        )
    return tuple(map(int, given))


def parse_file_mode(
    _context: click.Context, _parameter: click.Parameter, mode: str | None
) -> int | None:
    """Return a file mode of octal digits; None if none is given."""
    if not mode:
        return None
    if not _FILE_MODE.fullmatch(mode):
        raise click.BadParameter(f"{mode!r} is not a file mode in octal digits, as in 0660")
    return int(mode, 8)


def parse_group_id(
    _context: click.Context, _parameter: click.Parameter, group: str | None
) -> int | None:
    """Return the id of a group that is given by its name or its id; None if none is given."""
    if not group:
        return None
    if _USER_ID.fullmatch(group) and int(group) <= _LAST_ID:
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise click.BadParameter(f"there is no group {group!r}") from None


def socket_access(mode: int | None, group: int | None, users: Collection[int]) -> Access | None:
    """Return who may open the Unix sockets; None to leave that to the umask."""
    if mode is None:
        if group is None and not users:
            return None
        mode = _WORLD_MODE if group is None else _GROUP_MODE
    return Access(mode, group)
