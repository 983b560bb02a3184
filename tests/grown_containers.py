"""Which containers of a process grow: dicts, lists, sets and deques that have more elements than before."""

from __future__ import annotations

import gc
import json
import socket
import threading
from collections import deque
from collections.abc import Mapping
from functools import _lru_cache_wrapper
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

__all__ = [
    "Container",
    "Containers",
    "find_containers",
    "find_grown",
    "receive_containers",
    "serve_containers",
]

_TYPES: Final = (dict, list, set, deque)
_LEAST_COUNT: Final = 50
"""Smaller containers are not looked at."""

_TIMEOUT_S: Final = 60.0


class Container(NamedTuple):
    """How many elements a container has, what it is, and who refers to it."""

    length: int
    description: str


Containers: TypeAlias = Mapping[str, Container]
"""Containers by their identity."""


def find_containers() -> Containers:
    """Return the containers of this process, without those of caches that `functools.lru_cache` bounds."""
    gc.collect()
    found: dict[int, tuple[Any, object]] = {}
    bounded: set[int] = set()
    for owner in gc.get_objects():
        # a dict of plain numbers is not among the objects, but its owner is
        held = [one for one in gc.get_referents(owner) if isinstance(one, _TYPES)]
        found.update((id(one), (one, owner)) for one in held)
        if isinstance(owner, _lru_cache_wrapper) and owner.cache_info().maxsize is not None:
            bounded.update(map(id, held))
    return {
        str(number): Container(len(one), _describe(one, owner))
        for number, (one, owner) in found.items()
        if len(one) >= _LEAST_COUNT and number not in bounded
    }


def _describe(container: Any, owner: object) -> str:
    """Return the types of a container, its owner and its first element, and its name among variables."""
    try:
        first = type(next(iter(container))).__qualname__
        names = (
            [key for key, value in owner.items() if value is container]
            if isinstance(owner, dict)
            else []
        )
    except (RuntimeError, StopIteration):  # another thread changes one of them
        first, names = "unknown", []
    return f"{type(container).__qualname__} {names} of {first} in {type(owner).__qualname__}"


def find_grown(*moments: Containers, count: int) -> list[str]:
    """Return which containers have got at least `count` more elements from each moment to the next."""
    return [
        f"{moments[-1][number].description}: {[some[number].length for some in moments]}"
        for number in set.intersection(*map(set, moments))
        if all(
            after[number].length - before[number].length >= count
            for before, after in pairwise(moments)
        )
    ]


def serve_containers(path: str) -> None:
    """Tell `receive_containers` in other processes about this one, in a thread."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    threading.Thread(target=_answer, args=(listener,), daemon=True).start()


def _answer(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(json.dumps(find_containers()).encode())


def receive_containers(path: Path) -> Containers:
    """Return the containers of the process that serves them at a path."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rb") as answer:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(str(path))
        return {number: Container(*fields) for number, fields in json.load(answer).items()}
