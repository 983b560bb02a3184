"""Errors for unknown keyword arguments: as Chainer raises them, with a suggestion."""

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
"""Our name for each argument name of PyTorch, TensorFlow, JAX, ONNX and MXNet, theirs in lower case."""


def reject_unknown_keywords(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function so that it raises Chainer's errors for unknown keyword arguments.

    These are a ValueError for ``deterministic``, and a TypeError for others. The TypeError names the function and the
    keywords in alphabetical order, and suggests similar ones that the function has. The signature does not change.
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
    """Return the end of a message, with a known keyword for each unknown one. Empty if none is similar."""
    suggestions = [
        f"'{closest}' for '{name}'"
        for name in sorted(unknown)
        if (closest := _closest_keyword(name, known))
    ]
    return f"; did you mean {', '.join(suggestions)}?" if suggestions else ""


def _closest_keyword(name: str, known: Set[str]) -> str:
    """Return the known keyword that was probably meant. Empty if none is similar."""
    alias = _FRAMEWORK_ALIASES.get(name.lower(), "")
    if alias in known:
        return alias
    by_lower = {keyword.lower(): keyword for keyword in known if keyword != "self"}
    matches = get_close_matches(name.lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else ""
