"""Each decision has a status, and decisions that change others and those that are changed name each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DECISIONS = Path(__file__).parents[1] / "DECISIONS.md"

NUMBERS = r"(\d+(?:, \d+)*(?: and \d+)?)"
STATUS = re.compile(
    rf"Status: (?:holds(?:, amended by {NUMBERS})?|replaced by {NUMBERS})"
    rf"(?:; amends {NUMBERS})?(?:; replaces {NUMBERS})?\."
)


def read_decisions() -> list[tuple[int, str]]:
    """Return the number and the status of each decision: what stands between its heading and its text."""
    decisions = re.findall(r"^## (\d+)\. .*\n\n(.*)\n\n", DECISIONS.read_text(), flags=re.MULTILINE)
    return [(int(number), status) for number, status in decisions]


def numbers_after(words: str, status: str) -> list[int]:
    found = re.search(rf"\b{words} {NUMBERS}", status)
    return list(map(int, re.findall(r"\d+", found[1]))) if found else []


def test_decisions_are_numbered_without_a_gap() -> None:
    numbers = [number for number, _ in read_decisions()]

    assert numbers == list(range(1, DECISIONS.read_text().count("\n## ") + 1))


def test_each_decision_has_a_status() -> None:
    without = [number for number, status in read_decisions() if STATUS.fullmatch(status) is None]

    assert without == []


@pytest.mark.parametrize(
    ("is_changed", "changes"), [("amended by", "amends"), ("replaced by", "replaces")]
)
def test_a_decision_that_changes_another_and_the_other_name_each_other(
    is_changed: str, changes: str
) -> None:
    decisions = read_decisions()

    told_by_the_earlier = {
        (n, later) for n, s in decisions for later in numbers_after(is_changed, s)
    }
    told_by_the_later = {(old, n) for n, s in decisions for old in numbers_after(changes, s)}

    assert told_by_the_earlier == told_by_the_later
    assert all(1 <= old < later <= len(decisions) for old, later in told_by_the_later)
