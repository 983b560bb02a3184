"""The options of calls, which a block of code can change, as with Chainer's using_config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, replace
from typing import NamedTuple

import numpy as np

from deconvd.errors import InvalidArgumentError
from deconvd.model.options import Options

__all__ = ["Config"]

_NAMES = tuple(field.name for field in fields(Options))


class _ConfigState(NamedTuple):
    """Options, and the names of those that a with-block has set."""

    options: Options
    names: frozenset[str]


_DEFAULT = _ConfigState(Options(), frozenset())


class Config:
    """The current options of one connection. Each thread and each asyncio task has options of its own."""

    def __init__(self) -> None:
        self._settings: ContextVar[_ConfigState] = ContextVar("settings")

    @property
    def options(self) -> Options:
        """The options of the current thread or asyncio task."""
        return self._settings.get(_DEFAULT).options

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
        settings = self._settings.get(_DEFAULT)
        changed = _ConfigState(
            _change_options(settings.options, {name: value}), settings.names | {name}
        )
        token = self._settings.set(changed)
        try:
            yield
        finally:
            self._settings.reset(token)

    @contextmanager
    def using_defaults(self, values: Mapping[str, object]) -> Iterator[None]:
        """Set those options for a ``with`` block that no block of `using` has set. See `Connection.using_defaults`.

        Raises:
            InvalidArgumentError: An option cannot have the value that is given for it.
        """
        settings = self._settings.get(_DEFAULT)
        missing = {
            name: value
            for name, value in values.items()
            if name not in settings.names and getattr(settings.options, name) != value
        }
        if not missing:
            yield
            return
        changed = _ConfigState(_change_options(settings.options, missing), settings.names)
        token = self._settings.set(changed)
        try:
            yield
        finally:
            self._settings.reset(token)


def _change_options(options: Options, values: Mapping[str, object]) -> Options:
    plain = {
        name: bool(value) if isinstance(value, np.bool_) else value
        for name, value in values.items()
    }
    return replace(options, **plain)  # type: ignore[arg-type]  # Options checks their types
