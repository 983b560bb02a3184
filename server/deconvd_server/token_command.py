"""The command `deconvd-server token`: it makes tokens, and keeps their hashes in the file that `--tokens` names."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import click

from deconvd.command_line import CliCommand, NamedPath, WholeNumber
from deconvd.console import ConsoleGroup
from deconvd_server.access.tokens import (
    TOKEN_NAME,
    TokenHash,
    new_token,
    parse_tokens,
    read_token_file,
)

__all__ = ["token"]

_OWNER_MODE: Final = 0o600
_DAY_S: Final = 24 * 60 * 60
_MAX_DAYS: Final = 36500


@click.group(cls=ConsoleGroup)
def token() -> None:
    """Make tokens, by which the server knows its callers."""


def _token_name(_context: click.Context, _parameter: click.Parameter, name: str) -> str:
    if not TOKEN_NAME.fullmatch(name):
        raise click.BadParameter(
            f"{name!r} is not 1 to 64 of the letters A-Z and a-z, digits, dots, _ and -"
        )
    return name


@token.command(cls=CliCommand)
@click.argument("name", callback=_token_name)
@click.option(
    "--tokens",
    "path",
    required=True,
    envvar="DECONVD_TOKENS",
    type=NamedPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The file that keeps the hashes of all tokens. It is created if it is not there.",
)
@click.option(
    "--days",
    type=WholeNumber(1, _MAX_DAYS),
    default=None,
    show_default="for ever",
    help="For how many days the token is valid.",
)
def new(name: str, path: Path, days: int | None) -> None:
    """Make a token for NAME, and print it, this once.

    Calls with this token are NAME's: all tokens of one name share residents, quota and places. NAME may have several
    tokens at once, so that a new one can be handed out before the line of the old one is removed from the file. A
    running server reads the file again within a second.
    """
    secret = new_token()
    not_after_s = float("inf") if days is None else time.time() + days * _DAY_S
    try:
        count = _append(path, TokenHash.of(name, secret, not_after_s))
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise click.ClickException(f"{path}: {error}") from None
    click.echo(secret)
    if count > 1:
        click.echo(f"{name} has {count} tokens now: to revoke one, remove its line", err=True)


def _append(path: Path, made: TokenHash) -> int:
    """Add a token to a file, and return how many its name has then.

    The file is replaced as a whole, so that a server never reads a part of it.
    """
    path = Path(os.path.realpath(path))  # the file itself is replaced, not a link to it
    with _lock_file(path):
        data = read_token_file(path)
        tokens = [*parse_tokens(data), made]
        if data and not data.endswith(b"\n"):
            data += b"\n"
        day = time.strftime("%Y-%m-%d", time.gmtime())
        data += f"{made.as_line()}  # made on {day}\n".encode()
        _replace(path, data)
    return sum(each.name == made.name for each in tokens)


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """Keep others from replacing a file for the block. The file is created if it is not there."""
    while True:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, _OWNER_MODE
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                    yield
                    return
            # another one has replaced the file while this one waited: the new file has a lock of its own
        finally:
            os.close(descriptor)


def _replace(path: Path, data: bytes) -> None:
    """Replace a file by one with the same owner and permissions."""
    former = path.stat()
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, former.st_mode & 0o777)
            if (former.st_uid, former.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(descriptor, former.st_uid, former.st_gid)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
