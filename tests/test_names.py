"""Names: one name means one thing, and what does something is a verb."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TypeAlias

import pytest

_ROOT: Final = Path(__file__).parents[1]
_SOURCES: Final = sorted(
    path
    for part in ("proto", "client", "server")
    for path in (_ROOT / part).rglob("*.py")
    if "_pb2" not in path.name
)

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef

_PARTICIPLE: Final = re.compile(
    "[a-z]+ed|begun|built|come|done|drawn|found|given|gone|got|had|heard|held|kept|left|lent|made|met|"
    "seen|sent|shown|taken|thought|told|understood|worn|written"
)
_PREPOSITION: Final = re.compile(
    "after|against|among|apart|around|at|before|beside|between|by|for|from|into?|near|of|off|on|out|over|"
    "to|under|up|with|within|without"
)
_NOT_PARTICIPLES: Final = frozenset({"embed", "feed", "need", "seed", "shed", "speed"})


def _is_participle(word: str) -> bool:
    return word not in _NOT_PARTICIPLES and _PARTICIPLE.fullmatch(word) is not None


def _is_property(function: _Function) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in function.decorator_list)


def _is_no_verb(name: str) -> bool:
    """Return whether a function's name is a participle or a preposition, alone or with a preposition after it.

    `of` alone is what a class is made of: an alternative constructor.
    """
    first, *rest = name.strip("_").split("_")
    if len(rest) > 1 or (rest and not _PREPOSITION.fullmatch(rest[0])) or name == "of":
        return False
    return _is_participle(first) or _PREPOSITION.fullmatch(first) is not None


def _functions(path: Path) -> Iterator[_Function]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, _Function):
            yield node


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in _SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name.lstrip("_")].append(f"{path.relative_to(_ROOT)}:{node.lineno}")

    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_functions_that_do_something_are_verbs() -> None:
    faults = [
        f"{path.relative_to(_ROOT)}:{function.lineno} {function.name}"
        for path in _SOURCES
        for function in _functions(path)
        if _is_no_verb(function.name) and not _is_property(function)
    ]

    assert faults == []


@pytest.mark.parametrize(
    "name", ["_made", "told_by", "taken_apart", "beside", "_within", "_opened"]
)
def test_a_participle_or_a_preposition_is_seen(name: str) -> None:
    assert _is_no_verb(name)


@pytest.mark.parametrize(
    "name", ["make", "read", "of", "shared_slice", "_need", "send_to", "is_held"]
)
def test_verbs_and_nouns_pass(name: str) -> None:
    assert not _is_no_verb(name)
