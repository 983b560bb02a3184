"""What help() shows: all that a user needs to call a function without reading its source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import pytest

import deconvd_client
from deconvd_client import Connection
from deconvd_server.call.ledger import Stage

# What these take is checked elsewhere, or is for the library itself.
INTERNAL = {"RemoteTensor.belongs_to", "RemoteTensor.resident_for", "from_message", "to_message"}


def functions() -> Iterator[Any]:
    """Yield each public function and method with the name that users know it by."""
    for name in deconvd_client.__all__:
        thing = getattr(deconvd_client, name)
        if isinstance(thing, FunctionType):
            yield pytest.param(thing, id=name)
        elif inspect.isclass(thing):
            for attribute, method in vars(thing).items():
                is_public = attribute == "__call__" or not attribute.startswith("_")
                full = f"{name}.{attribute}"
                if (
                    is_public
                    and isinstance(method, FunctionType)
                    and not {attribute, full} & INTERNAL
                ):
                    yield pytest.param(method, id=full)


@pytest.mark.parametrize("function", list(functions()))
def test_help_names_every_argument(function: Callable[..., object]) -> None:
    text = inspect.getdoc(function)
    assert text
    arguments = [name for name in inspect.signature(function).parameters if name != "self"]

    for name in arguments:
        assert f"{name}:" in text or f"{name}, " in text, name


def test_help_describes_every_entry_of_the_ledger() -> None:
    text = inspect.getdoc(Connection.last_ledger)

    assert text
    for stage in Stage:
        assert f"- ``{stage}``: " in text


@pytest.mark.parametrize("name", [n for n in deconvd_client.__all__ if not n.startswith("__")])
def test_every_public_name_has_a_description(name: str) -> None:
    thing = getattr(deconvd_client, name)

    assert "__doc__" in vars(thing) or not inspect.isclass(thing)
    assert thing.__doc__
    assert not thing.__doc__.startswith(f"{name}(")  # which dataclasses and named tuples make up
