"""Chainer's answers to keyword arguments that a function does not have, and which ones may be meant."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Set
from difflib import get_close_matches
from typing import Final, ParamSpec, TypeVar

__all__ = ["reject_unknown_keywords"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

_DETERMINISTIC_ERROR = (
    "deterministic argument is not supported anymore. "
    "Use chainer.using_config('cudnn_deterministic', value) "
    "context where value is either `True` or `False`."
)

_FRAMEWORK_ALIASES: Final = {
    "bias": "b",
    "dilation": "dilate",
    "dilation_rate": "dilate",
    "dilations": "dilate",
    "filter": "W",
    "filters": "W",
    "grad_output": "gy",
    "group": "groups",
    "input": "x",
    "kernel": "W",
    "num_group": "groups",
    "out_size": "outsize",
    "output_padding": "outsize",
    "output_shape": "outsize",
    "output_size": "outsize",
    "padding": "pad",
    "paddings": "pad",
    "pads": "pad",
    "target_shape": "outsize",
    "weight": "W",
    "weights": "W",
}
"""What PyTorch, TensorFlow, JAX, ONNX and MXNet call our arguments."""


def reject_unknown_keywords(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Make `function` raise what Chainer's functions raise for keywords it does not have.

    That is a ValueError for ``deterministic``, and for others a TypeError that names the function
    and them, sorted, and then the keywords that may be meant. The signature stays the function's own.
    """
    known = frozenset(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        unknown = kwargs.keys() - known
        if "deterministic" in unknown:
            raise ValueError(_DETERMINISTIC_ERROR)
        if unknown:
            names = ", ".join(repr(name) for name in sorted(unknown))
            message = f"{function.__name__}() got unexpected keyword argument(s) {names}"
            raise TypeError(message + _suggestions(unknown, known))
        return function(*args, **kwargs)

    return wrapper


def _suggestions(unknown: Set[str], known: Set[str]) -> str:
    """Return which known keywords may be meant by unknown ones; empty if that cannot be told."""
    meant = [
        f"'{near}' for '{name}'"
        for name in sorted(unknown)
        if (near := _closest_keyword(name, known))
    ]
    return f"; did you mean {', '.join(meant)}?" if meant else ""


def _closest_keyword(name: str, known: Set[str]) -> str:
    elsewhere = _FRAMEWORK_ALIASES.get(name.lower(), "")
    if elsewhere in known:
        return elsewhere
    by_lower = {keyword.lower(): keyword for keyword in known if keyword != "self"}
    close = get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[close[0]] if close else ""
