"""Chainer's answers to keyword arguments that a function does not have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["refuses_unknown_keywords"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_DETERMINISTIC = (
    "deterministic argument is not supported anymore. "
    "Use chainer.using_config('cudnn_deterministic', value) "
    "context where value is either `True` or `False`."
)


def refuses_unknown_keywords(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `function` raise what Chainer's functions raise for keywords it does not have.

    That is a ValueError for ``deterministic``, and for others a TypeError that names the function
    and them, sorted. The signature stays the function's own.
    """
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        unknown = kwargs.keys() - known
        if "deterministic" in unknown:
            raise ValueError(_DETERMINISTIC)
        if unknown:
            names = ", ".join(repr(name) for name in sorted(unknown))
            raise TypeError(f"{function.__name__}() got unexpected keyword argument(s) {names}")
        return function(*args, **kwargs)

    return wrapper
