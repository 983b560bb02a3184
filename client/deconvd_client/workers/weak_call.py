"""Callbacks that do not keep their owner alive: a connection that its user drops must go at once, without a cycle."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec

__all__ = ["weak_call"]

_P = ParamSpec("_P")


def weak_call(method: Callable[_P, None]) -> Callable[_P, None]:
    """Return a function that calls a bound method, and does nothing once the object has gone."""
    reference = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if (alive := reference()) is not None:
            alive(*args, **kwargs)

    return call
