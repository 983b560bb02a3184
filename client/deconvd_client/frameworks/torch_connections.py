"""Names of connections. Torch's operators take no Python objects, so a compiled graph has the name of its connection.

A name says how to connect, so that an exported program works in another process. It holds the target and the options,
never the tenant key or a token. If several connections of a process have the same target and options, their names get
a number.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from weakref import WeakKeyDictionary, WeakValueDictionary

from deconvd.errors import InvalidArgumentError
from deconvd.host.forks import new_reentrant_lock
from deconvd_client.credentials import Tls

__all__ = ["find_connection", "name_of", "register_connect", "shared_connection"]

_NUMBER: Final = "number"

_lock: Final = new_reentrant_lock()
_by_name: Final[WeakValueDictionary[str, Any]] = WeakValueDictionary()
"""The connections of this process that have a name. It does not keep them alive."""

_names: Final[WeakKeyDictionary[Any, str]] = WeakKeyDictionary()
_shared: Final[dict[str, Any]] = {}
"""The connections that were made here, by their names without a number. They live as long as the process."""

_connect: Callable[..., Any] | None = None


def register_connect(connect: Callable[..., Any]) -> None:
    """Set the function that makes connections, ``deconvd_client.connect``: this layer is below it."""
    global _connect  # noqa: PLW0603 - one function for the process
    _connect = connect


def name_of(connection: Any) -> str:
    """Return the name of a connection. It stays the same for as long as the connection exists."""
    name = _names.get(connection)
    if name is not None:
        return name
    with _lock:
        if connection not in _names:
            _names[connection] = name = _free_name(connection)
            _by_name[name] = connection
        return _names[connection]


def find_connection(name: str) -> Any:
    """Return the connection with a name. If there is none, connect as the name says.

    Raises:
        InvalidArgumentError: The name is not one of ours.
    """
    connection = _by_name.get(name)
    return _reconnect(name) if connection is None else connection


def shared_connection(target: str) -> Any:
    """Return the connection to a target that this process shares. It has the default options."""
    return _reconnect(json.dumps({"target": target}))


def _free_name(connection: Any) -> str:
    # a pickle has just what a copy of the connection needs, and no secret
    again, _ = connection.__reduce__()
    recipe = {"target": connection.target, **again.keywords}
    name, number = json.dumps(recipe, default=_to_json), 1
    while name in _by_name:
        number += 1
        name = json.dumps({**recipe, _NUMBER: number}, default=_to_json)
    return name


def _to_json(option: object) -> object:
    """Return an option that JSON does not know: a `Tls` by its attributes, the path of a file as a string."""
    if isinstance(option, Tls):
        return asdict(option)
    assert isinstance(option, os.PathLike)
    return os.fspath(option)


def _reconnect(name: str) -> Any:
    recipe = _parse_recipe(name)
    if _connect is None:
        raise InvalidArgumentError(
            f"no connection has the name {name}. Import deconvd_client.torch, which connects to it",
            argument="connection",
        )
    key = json.dumps(recipe)
    with _lock:
        if key not in _shared:
            if isinstance(recipe.get("tls"), dict):
                recipe["tls"] = Tls(**recipe["tls"])
            if "token" in recipe:  # a name has no token, but it may have the path of one
                recipe["token"] = Path(recipe["token"])
            _shared[key] = _connect(**recipe)
        return _shared[key]


def _parse_recipe(name: str) -> dict[str, Any]:
    try:
        recipe = json.loads(name)
        recipe.pop(_NUMBER, None)
        recipe["target"]
    except (ValueError, AttributeError, TypeError, KeyError):
        raise InvalidArgumentError(
            f"connection must be a name that deconvd_client.torch.name_of returns, got {name!r}",
            argument="connection",
        ) from None
    return dict(recipe)
