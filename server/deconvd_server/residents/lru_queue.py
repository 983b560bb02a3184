"""A queue in order of arrival, from which any item can be removed at once. No locks."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

__all__ = ["LruQueue"]

_T = TypeVar("_T")


class LruQueue(OrderedDict[_T, None]):
    """Items in the order in which they joined.

    Attributes:
        size_bytes: Total size of the items. The owner updates it whenever it adds or removes an item.
    """

    size_bytes = 0

    @property
    def first(self) -> _T | None:
        """The item that joined first; None if the queue is empty."""
        return next(iter(self), None)
