"""Tokens: secrets that say who calls. The file of tokens has the hash of each, and whose it is."""

from __future__ import annotations

import hmac
import logging
import os
import re
import secrets
import stat
import time
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from deconvd.host.watched_files import WatchedFiles

__all__ = ["TOKEN_NAME", "TokenFile", "TokenHash", "new_token", "parse_tokens", "read_token_file"]

TOKEN_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What a name may be."""

_PREFIX: Final = "dcd_"
"""So that a token that turns up where none should be is known for what it is."""

_SECRET_BYTES: Final = 32
"""So many that nobody can guess a token, and a hash that is fast to compute is as good as a slow one."""

_MAX_FILE_BYTES: Final = 4 << 20
"""Some 40,000 tokens. A larger file is something else."""

_HASH: Final = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NONE: Final = "-"
_FORM: Final = "NAME sha256:HEX [not-before] [not-after]"
_ALWAYS_S: Final = float("inf")

_log = logging.getLogger(__name__)


class TokenHash(NamedTuple):
    """One line of a file of tokens.

    Attributes:
        name: Whose token it is.
        digest: The SHA-256 digest of the token.
        not_before_s: From when it is valid, in seconds of the wall clock since 1970.
        not_after_s: From when it is no longer valid.
    """

    name: str
    digest: bytes
    not_before_s: float = -_ALWAYS_S
    not_after_s: float = _ALWAYS_S

    @classmethod
    def of(cls, name: str, token: str, not_after_s: float = _ALWAYS_S) -> TokenHash:
        """Return the hash of a token."""
        return cls(name, _digest(token), not_after_s=not_after_s)

    def as_line(self) -> str:
        """Return its line, without the line's end."""
        dates = [_date_text(self.not_before_s), _date_text(self.not_after_s)]
        while dates and dates[-1] == _NONE:
            dates.pop()
        return " ".join([self.name, f"sha256:{self.digest.hex()}", *dates])


def new_token() -> str:
    """Return a token that nobody can guess."""
    return _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)


def parse_tokens(data: bytes) -> list[TokenHash]:
    """Return the tokens in the contents of a file.

    Raises:
        ValueError: A line has another form. The message names the line, and quotes nothing of it: it may be a secret.
    """
    tokens: dict[bytes, tuple[int, TokenHash]] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token = _parse_line(line)
        except ValueError as error:
            raise ValueError(f"line {number} {error}") from None
        if token is None:
            continue
        former, _ = tokens.setdefault(token.digest, (number, token))
        if former != number:
            raise ValueError(
                f"line {number} must have a token of its own, and line {former} has the same"
            )
    return [token for _, token in tokens.values()]


def read_token_file(path: Path) -> bytes:
    """Return the contents of a file of tokens.

    Raises:
        OSError: The file cannot be read.
        ValueError: It cannot be a file of tokens: it is no regular file, is too large, or everyone may change it.
    """
    # a pipe without a writer must not be waited for
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it must be a regular file")
        if status.st_mode & stat.S_IWOTH:
            raise ValueError(
                "every user may write to it: take that permission away, as by chmod 600"
            )
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"it must have at most {_MAX_FILE_BYTES} bytes")
    if status.st_mode & stat.S_IROTH:
        _log.warning(
            "every user may read the file of tokens %s: chmod 600 would prevent that", path
        )
    return data


class TokenFile:
    """The tokens in a file, which is read again when it changes. Thread-safe.

    Args:
        path: The file. Its lines have the form ``NAME sha256:HEX [not-before] [not-after]``. Dates are of ISO 8601, in
            UTC if they say nothing else, and ``-`` stands for none. ``#`` begins a comment. A name may have several
            tokens, so that a new one can be handed out while the old one is still in use.

    Raises:
        OSError: The file cannot be read.
        ValueError: It has another form, or cannot be trusted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: WatchedFiles[dict[bytes, TokenHash]] = WatchedFiles([path], self._load)

    def __repr__(self) -> str:
        return f"TokenFile({os.fspath(self._path)!r})"

    def name_of(self, token: str) -> str | None:
        """Return whose token it is; None if it is unknown or out of its time.

        The time that this takes tells nothing about the tokens of the file: they are found by their digests, and an
        unknown token is compared, too.
        """
        digest = _digest(token)
        found = self._files.current().get(digest, _NOBODY)
        is_same = hmac.compare_digest(found.digest, digest)
        is_valid = found.not_before_s <= time.time() < found.not_after_s
        return found.name if is_same and is_valid else None

    def _load(self) -> dict[bytes, TokenHash]:
        try:
            tokens = parse_tokens(read_token_file(self._path))
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None
        return {token.digest: token for token in tokens}


_NOBODY: Final = TokenHash("", bytes(sha256().digest_size))
"""Stands for an unknown token."""


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogatepass")).digest()


def _parse_line(line: bytes) -> TokenHash | None:
    """Return the token of a line; None if it has none. The error says what the line must be."""
    try:
        words = line.partition(b"#")[0].decode("ascii").split()
    except UnicodeDecodeError:
        raise ValueError("must be ASCII, except in a comment") from None
    if not words:
        return None
    if not 2 <= len(words) <= 4:
        raise ValueError(f"must have the form {_FORM}, and has {len(words)} words")
    name, digest, *dates = words
    if not TOKEN_NAME.fullmatch(name):
        raise ValueError(
            "must begin with a name of 1 to 64 letters A-Z and a-z, digits, dots, _ and -"
        )
    match = _HASH.fullmatch(digest)
    if match is None:
        raise ValueError("must have a hash as its second word: sha256: and 64 hexadecimal digits")
    not_before_s, not_after_s = -_ALWAYS_S, _ALWAYS_S
    if dates and dates[0] != _NONE:
        not_before_s = _parse_date(dates[0], "third")
    if dates[1:] and dates[1] != _NONE:
        not_after_s = _parse_date(dates[1], "fourth")
    if not_before_s >= not_after_s:
        raise ValueError("must have a not-after that is later than its not-before")
    return TokenHash(name, bytes.fromhex(match[1]), not_before_s, not_after_s)


def _parse_date(text: str, place: str) -> float:
    try:
        date = datetime.fromisoformat(text)
        # in UTC it must have a year, too
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        raise ValueError(
            f"must have a date as its {place} word, as in 2030-01-31 or 2030-01-31T12:00:00Z, or {_NONE}"
        ) from None


def _date_text(time_s: float) -> str:
    if abs(time_s) == _ALWAYS_S:
        return _NONE
    # strftime gives years before 1000 fewer digits on some systems
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
