"""The token in the header ``authorization: Bearer TOKEN``, which calls by gRPC and scrapes of metrics have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from deconvd.errors import UnauthenticatedError

__all__ = ["bearer_token"]

_SCHEME: Final = "bearer"
_MAX_TOKEN_LENGTH: Final = 512
"""No token is longer, and what is longer is not hashed."""


def bearer_token(values: Sequence[Any]) -> str:
    """Return the token in the values of all headers of that name; empty if there is none.

    Raises:
        UnauthenticatedError: There are several, or the one has another form.
    """
    if not values:
        return ""
    value = values[0]
    scheme, _, token = value.partition(" ") if isinstance(value, str) else ("", "", "")
    if len(values) > 1 or scheme.lower() != _SCHEME or not _is_token(token):
        raise UnauthenticatedError(
            "authorization must be given once, as 'Bearer TOKEN', in the call's metadata"
        )
    return token


def _is_token(text: str) -> bool:
    return (
        0 < len(text) <= _MAX_TOKEN_LENGTH
        and text.isascii()
        and text.isprintable()
        and " " not in text
    )
