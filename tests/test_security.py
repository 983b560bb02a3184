"""The bounds that SECURITY.md states are those of the code."""

from __future__ import annotations

import re
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from deconvd_server.__main__ import main
from deconvd_server.resources.budgets import PROCESS_BYTES, Budgets

SECURITY = Path(__file__).parent.parent / "SECURITY.md"

UNITS = {"": 1, "s": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "MB": 1e6}
NUMBER = re.compile(r"([\d.]+)(?:/(\d+))?(?: (s|bytes|KiB|MiB|GiB|MB))?\b")
NAME = re.compile(r"`([\w.]+\.\w+|--[\w-]+)`")

MEMORY_BYTES = 1 << 30
"""Of which, beside the process's own, fractions are stated: so much that none of them is at its least or its most."""


def rows() -> list[tuple[list[float], list[str]]]:
    """Return the numbers and the names in each row of the tables that say what sets a bound."""
    tables = re.findall(
        r"^\|.*\| set by \|\n\|[-|]+\|\n((?:\|.*\|\n)+)", SECURITY.read_text(), re.MULTILINE
    )
    found = []
    for row in "".join(tables).splitlines():
        _, _, *cells, names, _ = row.split("|")
        numbers = [
            float(number) / int(of) * MEMORY_BYTES if of else float(number) * UNITS[unit]
            for number, of, unit in NUMBER.findall(" ".join(cells))
        ]
        found.append((numbers, NAME.findall(names)))
    return found


def value_of(name: str) -> float | None:
    """Return the value of a constant, or the default of a class's field or an option, if it is a number."""
    if name.startswith("--"):
        (option,) = [option for option in main.params if name in option.opts]
        return option.default if isinstance(option.default, int | float) else None
    module_name, _, constant = name.rpartition(".")
    class_name = module_name.rpartition(".")[2]
    if not class_name[0].isupper():
        return float(getattr(module(module_name), constant))
    owner = getattr(module(module_name.rpartition(".")[0]), class_name)
    if owner is Budgets:
        return float(getattr(Budgets.of(MEMORY_BYTES + PROCESS_BYTES), constant))
    (default,) = [field.default for field in fields(owner) if field.name == constant]
    assert isinstance(default, int)
    return float(default)


def module(name: str) -> ModuleType:
    return import_module(name if name.startswith("deconvd.") else f"deconvd_server.{name}")


@pytest.mark.parametrize(("numbers", "names"), rows(), ids=str)
def test_each_bound_is_that_of_its_constant(numbers: list[float], names: list[str]) -> None:
    values = [value for value in map(value_of, names) if value is not None]

    assert values
    assert numbers == values


def test_the_tables_have_bounds() -> None:
    assert len(rows()) > 20
