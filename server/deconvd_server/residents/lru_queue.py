"""Things in the order in which they came, which can be taken out wherever they are. No locks."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeVar

__all__ = ["LruQueue"]

_T = TypeVar("_T")


class LruQueue(OrderedDict[_T, None]):
    """Things in the order in which they came.

    Attributes:
        size_bytes: What they count for. Whoever adds or removes one sets it.
    """

    size_bytes = 0

    @property
    def first(self) -> _T | None:
        """The one that came first."""
        return next(iter(self), None)
