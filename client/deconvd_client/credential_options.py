"""Checks the options `tls` and `token` of `connect`, and finds what the environment says instead of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from deconvd.errors import InvalidArgumentError
from deconvd.host.watched_files import WatchedFiles
from deconvd.wire.grpc_options import unix_path
from deconvd_client.credentials import Credentials, Tls
from deconvd_client.transports.targets import host_of, is_local, resolver_of

__all__ = ["parse_credentials"]

_TOKEN_VARIABLE: Final = "DECONVD_TOKEN"  # noqa: S105 - a variable's name
_TOKEN_FILE_VARIABLE: Final = "DECONVD_TOKEN_FILE"  # noqa: S105 - a variable's name
_CA_VARIABLE: Final = "DECONVD_TLS_CA"
_CERT_VARIABLE: Final = "DECONVD_CLIENT_CERT"
_KEY_VARIABLE: Final = "DECONVD_CLIENT_KEY"

_MAX_TOKEN_LENGTH: Final = 512


def parse_credentials(target: str, tls: object, token: object) -> Credentials:
    """Return the credentials for a target.

    Args:
        target: A target that `parse_target` has checked.
        tls, token: As in `connect`.

    Raises:
        InvalidArgumentError: One of them is wrong, or a token would travel in plain text to another host.
    """
    get_token = _parse_token(token)
    is_unix = bool(unix_path(target))
    if tls is None and not is_unix:
        credentials = _credentials_from_environment(get_token)
    else:
        credentials = Credentials(get_token, _parse_tls(tls))
    is_trusted = is_unix or credentials.tls is not None or tls is False
    if not is_trusted and credentials.token() and not _is_loopback(target):
        raise InvalidArgumentError(
            f"tls must be given to send a token to {host_of(target)}: True, or deconvd_client.Tls(ca=...); False sends "
            "it in plain text, over a network that you trust",
            argument="tls",
        )
    return credentials


def _is_loopback(target: str) -> bool:
    return is_local(target) and not resolver_of(target)


def _credentials_from_environment(get_token: Callable[[], str]) -> Credentials:
    """Return the token with the TLS that the environment asks for."""
    names = (_CA_VARIABLE, _CERT_VARIABLE, _KEY_VARIABLE)
    paths = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not paths:
        return Credentials(get_token)
    try:
        return Credentials(get_token, Tls(*map(paths.get, names)))
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{', '.join(paths)}: {error}", argument="tls") from None


def _parse_tls(tls: object) -> Tls | None:
    if isinstance(tls, Tls):
        return tls
    if tls is None or isinstance(tls, bool):
        return Tls() if tls else None
    raise InvalidArgumentError(
        f"tls must be True, False, None or a deconvd_client.Tls, got {tls!r}", argument="tls"
    )


def _parse_token(token: object) -> Callable[[], str]:
    """Return a function that returns the token as of now. Errors do not show it: it is a secret."""
    if token is not None:
        return _token_source(token, "token")
    if text := os.environ.get(_TOKEN_VARIABLE, ""):
        return _token_source(text, _TOKEN_VARIABLE)
    if path := os.environ.get(_TOKEN_FILE_VARIABLE, ""):
        return _token_source(Path(path), _TOKEN_FILE_VARIABLE)
    return str


def _token_source(token: object, name: str) -> Callable[[], str]:
    if isinstance(token, str):
        checked = _check_token(token, name)
        return lambda: checked
    if not isinstance(token, os.PathLike):
        raise InvalidArgumentError(
            f"token must be a str, or a pathlib.Path of a file, got {type(token).__name__}",
            argument="token",
        )
    try:
        path = Path(token)
        return WatchedFiles([path], lambda: _read_token(path, name)).current
    except InvalidArgumentError:
        raise
    except (OSError, ValueError, TypeError) as error:  # a path of bytes is a TypeError
        raise InvalidArgumentError(
            f"{name} must be a file that can be read: {error}", argument="token"
        ) from None


def _read_token(path: Path, name: str) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_TOKEN_LENGTH + 64)  # and the end of its line
    return _check_token(data.decode("latin-1").strip(" \t\r\n"), f"{name}, the file {path},")


def _check_token(token: str, name: str) -> str:
    """Return a token that can be sent. Raises InvalidArgumentError for others."""
    others_count = sum(not "!" <= letter <= "~" for letter in token)
    if others_count or not 0 < len(token) <= _MAX_TOKEN_LENGTH:
        raise InvalidArgumentError(
            f"{name} must have from 1 to {_MAX_TOKEN_LENGTH} ASCII characters without spaces, got {len(token)} "
            f"characters, {others_count} of them others",
            argument="token",
        )
    return token
