"""Capabilities: secret names, which let whoever knows one use what it stands for."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from deconvd_server.resources.worker_table import WORKERS

__all__ = ["NAME_BYTES", "CapabilityTable", "is_same_secret", "new_name"]

NAME_BYTES: Final = 16

_V = TypeVar("_V")


def new_name() -> bytes:
    """Return a name that nobody can guess. If several processes serve as one, it begins with this one's number."""
    mark = WORKERS.mark
    return mark + secrets.token_bytes(NAME_BYTES - len(mark))


def is_same_secret(secret: bytes, other: bytes) -> bool:
    """Compare two secrets in a time that does not depend on their contents."""
    return hmac.compare_digest(_digest(secret), _digest(other))


class CapabilityTable(Generic[_V]):
    """Values by secret name and by owner. Not thread-safe.

    The keys are digests of the names: so the time of a look-up reveals nothing about the names. An owner's name is
    unknown to every other owner: that look-up fails in the same way as for a name that nobody has.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Hashable, bytes], _V] = {}

    def put(self, name: bytes, value: _V, owner: Hashable = None) -> None:
        """Let a new name of an owner stand for a value."""
        self._values[owner, _digest(name)] = value

    def get(self, name: bytes, owner: Hashable = None) -> _V | None:
        """Return the value of an owner's name; None if the owner has no such name."""
        return self._values.get((owner, _digest(name)))

    def pop(self, name: bytes, owner: Hashable = None) -> _V:
        """Remove an owner's name, and return its value. Raises KeyError if the owner has no such name."""
        return self._values.pop((owner, _digest(name)))

    def values(self) -> list[_V]:
        """Return all values, in the order in which they were put."""
        return list(self._values.values())

    def __len__(self) -> int:
        return len(self._values)


def _digest(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=16).digest()
