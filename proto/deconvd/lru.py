"""A bounded number of values by key, of which the least recently used makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Lru"]

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class Lru(Generic[_K, _V]):
    """At most `limit_count` values by key, none of which is None. Not thread-safe."""

    def __init__(self, limit_count: int) -> None:
        self._limit_count = limit_count
        self._values: OrderedDict[_K, _V] = OrderedDict()

    def get(self, key: _K) -> _V | None:
        """Return the value of a key, which is used now; None if there is none."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: _K, value: _V) -> _V:
        """Keep a value by a key, which is used now, and return it."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._limit_count:
            self._values.popitem(last=False)
        return value

    def drop(self, key: _K) -> None:
        """Keep no value by a key."""
        self._values.pop(key, None)

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()
