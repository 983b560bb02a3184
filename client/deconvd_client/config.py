"""The options of calls, which a block of code can change, as with Chainer's using_config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.options import Options

__all__ = ["Config"]

_NAMES = tuple(field.name for field in fields(Options))
_DEFAULT = Options()


class Config:
    """The current options of one connection. Each thread and each asyncio task has options of its own."""

    def __init__(self) -> None:
        self._options: ContextVar[Options] = ContextVar("options")

    @property
    def options(self) -> Options:
        """The options of the current thread or asyncio task."""
        return self._options.get(_DEFAULT)

    @contextmanager
    def using(self, name: str, value: object) -> Iterator[None]:
        """Set an option for a ``with`` block. See `Connection.using_config`.

        Raises:
            InvalidArgumentError: There is no option of that name, or the option cannot have that value.
        """
        if name not in _NAMES:
            raise InvalidArgumentError(
                f"name must be one of {', '.join(_NAMES)}, got {name!r}", argument="name"
            )
        value = bool(value) if isinstance(value, np.bool_) else value
        changed = replace(self.options, **{name: value})  # type: ignore[arg-type]  # Options checks its type
        token = self._options.set(changed)
        try:
            yield
        finally:
            self._options.reset(token)
