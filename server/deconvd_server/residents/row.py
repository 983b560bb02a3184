"""Things in the order in which they came, which can be taken out wherever they are. No locks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

__all__ = ["Row"]


class _Counted(Protocol):
    @property
    def held_bytes(self) -> int: ...


_T = TypeVar("_T", bound=_Counted)


class Row(Generic[_T]):
    """Things in the order in which they came.

    Attributes:
        size_bytes: What they count for, which must not change while they are in it.
    """

    __slots__ = ("_things", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self._things: OrderedDict[_T, None] = OrderedDict()

    def __iter__(self) -> Iterator[_T]:
        return iter(self._things)

    @property
    def first(self) -> _T | None:
        """The one that came first."""
        return next(iter(self._things), None)

    def add(self, thing: _T) -> None:
        """Add one at the end."""
        self._things[thing] = None
        self.size_bytes += thing.held_bytes

    def remove(self, thing: _T) -> None:
        """Remove one."""
        del self._things[thing]
        self.size_bytes -= thing.held_bytes
