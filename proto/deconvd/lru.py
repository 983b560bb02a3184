"""A small cache that evicts the least recently used entry."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Lru"]

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class Lru(Generic[_K, _V]):
    """A cache of at most `limit_count` values. No value may be None. Not thread-safe."""

    def __init__(self, limit_count: int) -> None:
        self._limit_count = limit_count
        self._values: OrderedDict[_K, _V] = OrderedDict()

    def get(self, key: _K) -> _V | None:
        """Return the value of a key, and mark it as used now. None if the key is not in the cache."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: _K, value: _V) -> _V:
        """Store a value, mark it as used now, and return it. The least recently used one may be evicted."""
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._limit_count:
            self._values.popitem(last=False)
        return value

    def drop(self, key: _K) -> None:
        """Remove a key. Does nothing if the key is not in the cache."""
        self._values.pop(key, None)

    def clear(self) -> None:
        """Remove all keys."""
        self._values.clear()
