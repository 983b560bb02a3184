"""Replaces functions inside Chainer while something is installed, and puts Chainer's own back after it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import chainer
from chainer.functions.connection import convolution_2d as convolution_module
from chainer.functions.connection import deconvolution_2d as deconvolution_module

__all__ = ["Replacement", "add_replacement", "remove_replacement"]


class Replacement(Protocol):
    """What is computed in place of Chainer's own functions."""

    replaces_convolution_gradients: bool
    """Whether gx and gW of ``convolution_2d`` are computed by it, too."""

    def deconvolution_2d(self, *args: Any, **kwargs: Any) -> Any:
        """Compute ``chainer.functions.deconvolution_2d``."""

    def differentiate_convolution(
        self, node: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]
    ) -> Any:
        """Compute ``Convolution2DFunction.backward``. None if this is not for it."""


_lock: Final = threading.Lock()
_replacements: tuple[Replacement, ...] = ()
"""All of the process. The last one counts."""

_undo: list[Callable[[], None]] = []
"""Puts Chainer's own functions back. Empty while they are in place."""


class _Thread(threading.local):
    """What the thread does now."""

    keeps_own = False
    """Whether it is in a gradient that Chainer's own functions must compute."""


_thread: Final = _Thread()


def add_replacement(replacement: Replacement) -> None:
    """Have Chainer's functions replaced until the replacement is removed, or another one is added."""
    global _replacements  # noqa: PLW0603  # Chainer's functions are global, too
    with _lock:
        if not _replacements:
            _patch_all()
        _replacements = (*_replacements, replacement)


def remove_replacement(replacement: Replacement) -> None:
    """Remove a replacement, wherever it is among them. The last one that is left counts. Twice is harmless."""
    global _replacements  # noqa: PLW0603  # see above
    with _lock:
        _replacements = tuple(one for one in _replacements if one is not replacement)
        while _undo and not _replacements:
            _undo.pop()()


def _patch_all() -> None:
    own = deconvolution_module.deconvolution_2d
    # links.Deconvolution2D takes it from its module, and everyone else from chainer.functions
    for place in (chainer.functions, deconvolution_module):
        _patch(place, "deconvolution_2d", _make_deconvolution(own))
    node = convolution_module.Convolution2DFunction
    _patch(node, "backward", _make_convolution_backward(node.backward))
    gradient = convolution_module.Convolution2DGradW
    _patch(gradient, "backward", _make_gradient_backward(gradient.backward))


def _patch(place: Any, name: str, new: Any) -> None:
    old = getattr(place, name)
    _undo.append(lambda: setattr(place, name, old))
    setattr(place, name, new)


def _make_deconvolution(own: Any) -> Any:
    @functools.wraps(own)
    def deconvolution_2d(*args: Any, **kwargs: Any) -> Any:
        current = _replacements  # another thread may change it
        if not current or _thread.keeps_own:
            return own(*args, **kwargs)
        return current[-1].deconvolution_2d(*args, **kwargs)

    return deconvolution_2d


def _make_convolution_backward(own: Any) -> Any:
    @functools.wraps(own)
    def backward(self: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]) -> Any:
        current = _replacements
        if current and current[-1].replaces_convolution_gradients:
            result = current[-1].differentiate_convolution(self, indexes, grad_outputs)
            if result is not None:
                return result
        with _keep_own():
            return own(self, indexes, grad_outputs)

    return backward


def _make_gradient_backward(own: Any) -> Any:
    """Return backward of Chainer's own gradient of W, which is of a convolution or a deconvolution of its own."""

    @functools.wraps(own)
    def backward(self: Any, indexes: tuple[int, ...], grad_outputs: tuple[Any]) -> Any:
        with _keep_own():
            return own(self, indexes, grad_outputs)

    return backward


@contextmanager
def _keep_own() -> Iterator[None]:
    before, _thread.keeps_own = _thread.keeps_own, True
    try:
        yield
    finally:
        _thread.keeps_own = before
